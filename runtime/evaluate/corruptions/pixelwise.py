"""Corruptions that change each pixel on its own: noise, brightness, contrast and saturation.

Shape suffixes: H height, W width, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "brightness",
    "contrast",
    "gaussian_noise",
    "impulse_noise",
    "saturate",
    "shot_noise",
    "speckle_noise",
    "truncate",
]


def truncate(values: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Clip gray levels to [0, 255] in place and drop their fractions, as the original code does."""
    np.clip(values, 0, 255, out=values)
    return values.astype(np.uint8)


def gaussian_noise(image_HWC: NDArray[np.uint8], sigma: float, *, random: np.random.Generator) -> NDArray[np.uint8]:
    """Add normal noise with standard deviation `sigma`, where white is 1."""
    noise_HWC = random.standard_normal(image_HWC.shape, dtype=np.float32)
    noise_HWC *= np.float32(255 * sigma)
    noise_HWC += image_HWC
    return truncate(noise_HWC)


def shot_noise(image_HWC: NDArray[np.uint8], photons: float, *, random: np.random.Generator) -> NDArray[np.uint8]:
    """Replace each value with a Poisson-distributed photon count; `photons` photons are white."""
    means = np.arange(256) * (photons / 255)
    counts_HWC = random.poisson(means[image_HWC]).astype(np.float32)
    counts_HWC *= np.float32(255 / photons)
    return truncate(counts_HWC)


def impulse_noise(image_HWC: NDArray[np.uint8], share: float, *, random: np.random.Generator) -> NDArray[np.uint8]:
    """Set `share` of the values to black or white with equal probability."""
    drawn_HWC = random.random(image_HWC.shape, dtype=np.float32)
    result_HWC = image_HWC.copy()
    result_HWC[drawn_HWC < share] = 255
    result_HWC[drawn_HWC < share / 2] = 0
    return result_HWC


def speckle_noise(image_HWC: NDArray[np.uint8], sigma: float, *, random: np.random.Generator) -> NDArray[np.uint8]:
    """Add normal noise whose standard deviation is `sigma` times the value."""
    noise_HWC = random.standard_normal(image_HWC.shape, dtype=np.float32)
    noise_HWC *= np.float32(sigma)
    noise_HWC += 1
    noise_HWC *= image_HWC
    return truncate(noise_HWC)


def brightness(image_HWC: NDArray[np.uint8], amount: float) -> NDArray[np.uint8]:
    """Add `amount` to the HSV value; white is 1."""
    hsv_HWC = _to_hsv(image_HWC)
    value_HW = hsv_HWC[..., 2]
    value_HW += np.float32(amount)
    np.minimum(value_HW, 1, out=value_HW)
    return _from_hsv(hsv_HWC)


def saturate(image_HWC: NDArray[np.uint8], factor: float, amount: float) -> NDArray[np.uint8]:
    """Multiply the HSV saturation by `factor` and add `amount`; full saturation is 1."""
    hsv_HWC = _to_hsv(image_HWC)
    saturation_HW = hsv_HWC[..., 1]
    saturation_HW *= np.float32(factor)
    saturation_HW += np.float32(amount)
    np.minimum(saturation_HW, 1, out=saturation_HW)
    return _from_hsv(hsv_HWC)


def contrast(image_HWC: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """Scale the distance of each value to its channel's mean by `factor`."""
    import cv2

    means = np.array(cv2.mean(image_HWC)[:3]) / 255
    levels = np.arange(256)[:, None] / 255
    table = truncate(((levels - means) * factor + means) * 255)
    return cv2.LUT(image_HWC, table[None])  # type: ignore[no-any-return]


def _to_hsv(image_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return hue in degrees, and saturation and value in [0, 1]."""
    import cv2

    return cv2.cvtColor(image_HWC.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)  # type: ignore[no-any-return]


def _from_hsv(hsv_HWC: NDArray[np.float32]) -> NDArray[np.uint8]:
    import cv2

    return truncate(cv2.cvtColor(hsv_HWC, cv2.COLOR_HSV2RGB) * np.float32(255))
