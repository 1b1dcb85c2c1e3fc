"""Spatter: drops of water, or of mud, on the lens."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.evaluate.corruptions.blur import gaussian
from runtime.evaluate.corruptions.pixels import truncate

__all__ = ["spatter"]

_WATER = (175, 238, 238)
"""RGB, pale turquoise."""
_MUD = (63, 42, 20)
"""RGB, brown."""


def spatter(
    image_HWC: NDArray[np.uint8],
    mean: float,
    spread: float,
    sigma: float,
    least: float,
    strength: float,
    mud: int,
    *,
    random: np.random.Generator,
) -> NDArray[np.uint8]:
    """Splashes water or mud.

    Args:
        image_HWC: uint8 RGB.
        mean: of the normal noise that drops are cut from.
        spread: its standard deviation.
        sigma: of the Gaussian that smooths it, in pixels.
        least: smoothed noise below this is no drop.
        strength: how much color water adds; for mud, the Gaussian that softens its edge, in pixels.
        mud: 1 for mud, 0 for water.
        random: draws the drops.
    """
    noise_HW = random.standard_normal(image_HWC.shape[:2], dtype=np.float32)
    noise_HW *= np.float32(spread)
    noise_HW += np.float32(mean)
    liquid_HW = gaussian(noise_HW, sigma)
    liquid_HW[liquid_HW < least] = 0
    image = image_HWC.astype(np.float32)
    if mud:
        cover_HW = gaussian(liquid_HW > least, strength)
        cover_HW[cover_HW < 0.8] = 0
        return truncate(image * (1 - cover_HW[..., None]) + cover_HW[..., None] * np.asarray(_MUD, np.float32))
    shine_HW = _shine((liquid_HW * 255).astype(np.uint8))
    return truncate(image + shine_HW[..., None] * (np.float32(strength) * np.asarray(_WATER, np.float32)))


def _shine(liquid_HW: NDArray[np.uint8]) -> NDArray[np.float32]:
    """How brightly the drops shine, in [0, 1]: more away from their edges, with relief from the upper left."""
    distance_HW = cv2.distanceTransform(255 - cv2.Canny(liquid_HW, 50, 150), cv2.DIST_L2, 5)
    near_HW = cv2.blur(np.minimum(distance_HW, 20), (3, 3)).astype(np.uint8)
    relief = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    relief_HW = cv2.blur(cv2.filter2D(cv2.equalizeHist(near_HW), cv2.CV_8U, relief), (3, 3))
    shine_HW: NDArray[np.float32] = liquid_HW * relief_HW.astype(np.float32)
    shine_HW /= max(float(shine_HW.max()), 1.0)
    return shine_HW
