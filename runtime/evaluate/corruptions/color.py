"""Brightness, contrast and saturation."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.evaluate.corruptions.pixels import truncate

__all__ = ["brightness", "contrast", "saturate"]


def brightness(image_HWC: NDArray[np.uint8], amount: float) -> NDArray[np.uint8]:
    """Adds `amount` to the value of hue, saturation and value; white is 1."""
    hsv_HWC = _hsv(image_HWC)
    value = hsv_HWC[..., 2]
    value += np.float32(amount)
    np.minimum(value, 1, out=value)
    return _pixels(hsv_HWC)


def saturate(image_HWC: NDArray[np.uint8], factor: float, amount: float) -> NDArray[np.uint8]:
    """Multiplies the saturation by `factor` and adds `amount`; full saturation is 1."""
    hsv_HWC = _hsv(image_HWC)
    saturation = hsv_HWC[..., 1]
    saturation *= np.float32(factor)
    saturation += np.float32(amount)
    np.minimum(saturation, 1, out=saturation)
    return _pixels(hsv_HWC)


def contrast(image_HWC: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """Brings each value nearer to its channel's mean: `factor` of the distance is left."""
    means = np.array(cv2.mean(image_HWC)[:3]) / 255
    levels = np.arange(256)[:, None] / 255
    table = truncate(((levels - means) * factor + means) * 255)
    return cv2.LUT(image_HWC, table[None])  # type: ignore[no-any-return]


def _hsv(image_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Hue in degrees, saturation and value in [0, 1]."""
    return cv2.cvtColor(image_HWC.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)  # type: ignore[no-any-return]


def _pixels(hsv_HWC: NDArray[np.float32]) -> NDArray[np.uint8]:
    return truncate(cv2.cvtColor(hsv_HWC, cv2.COLOR_HSV2RGB) * np.float32(255))
