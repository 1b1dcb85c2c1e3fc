"""Snow: blown flakes over a whitened image."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.evaluate.corruptions.motion import smear
from runtime.evaluate.corruptions.pixels import truncate
from runtime.evaluate.corruptions.zoom import enlarge

__all__ = ["snow"]


def snow(
    image_HWC: NDArray[np.uint8],
    mean: float,
    spread: float,
    size: float,
    least: float,
    radius: int,
    sigma: float,
    kept: float,
    *,
    random: np.random.Generator,
) -> NDArray[np.uint8]:
    """Adds flakes, and the same flakes upside down, to an image that is partly whitened.

    Args:
        image_HWC: uint8 RGB.
        mean: of the normal noise that flakes are cut from.
        spread: its standard deviation.
        size: how many times the noise is enlarged.
        least: noise below this is no flake; white is 1.
        radius: of the blur along the wind.
        sigma: of the blur along the wind.
        kept: the share of the image that is not whitened.
        random: draws flakes and wind.
    """
    noise_HW = random.standard_normal(image_HWC.shape[:2], dtype=np.float32)
    noise_HW *= np.float32(spread)
    noise_HW += np.float32(mean)
    noise_HW = enlarge(noise_HW, size)
    noise_HW[noise_HW < least] = 0
    noise_HW *= 255
    flakes_HW = smear(truncate(noise_HW), radius, sigma, random.uniform(-135, -45))
    image = image_HWC.astype(np.float32)
    white_HW = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    white_HW *= 1.5
    white_HW += 127.5
    result = np.maximum(image, white_HW[..., None])
    result *= np.float32(1 - kept)
    image *= np.float32(kept)
    result += image
    result += (flakes_HW.astype(np.float32) + flakes_HW[::-1, ::-1])[..., None]
    return truncate(result)
