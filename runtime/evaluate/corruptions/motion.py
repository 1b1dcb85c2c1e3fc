"""Motion blur, as ImageMagick's `MotionBlurImage` has it: one-sided, along a line, with Gaussian weights."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["motion_blur", "smear"]

_SLACK = 1 / 1024
"""Gray levels, so that rounding in float32 does not turn an even 200 into 199."""


def motion_blur(
    image_HWC: NDArray[np.uint8], radius: int, sigma: float, *, random: np.random.Generator
) -> NDArray[np.uint8]:
    """Blurs along a line within 45 degrees of the horizontal."""
    return smear(image_HWC, radius, sigma, random.uniform(-45, 45))


def smear(image: NDArray[np.uint8], radius: int, sigma: float, degrees: float) -> NDArray[np.uint8]:
    """Averages each pixel with those that follow it in one direction; the border's values go on outside.

    Args:
        image: uint8, HW or HWC.
        radius: 2 · radius + 1 pixels are averaged.
        sigma: the weight of pixel i is exp(−i² / 2σ²), before all are divided by their sum.
        degrees: the direction, clockwise from the right.

    Returns:
        uint8 of the same shape, fractions cut off.
    """
    height, width = image.shape[:2]
    offsets = _offsets(radius, sigma, degrees)
    top, left = max(0, -min(y for y, _ in offsets)), max(0, -min(x for _, x in offsets))
    bottom, right = max(0, max(y for y, _ in offsets)), max(0, max(x for _, x in offsets))
    padded: NDArray[Any] = cv2.copyMakeBorder(image.astype(np.float32), top, bottom, left, right, cv2.BORDER_REPLICATE)
    blurred = np.full(image.shape, _SLACK, np.float32)
    for (y, x), weight in offsets.items():
        shifted = padded[top + y : top + y + height, left + x : left + x + width]
        cv2.scaleAdd(shifted, weight, blurred, blurred)
    return blurred.astype(np.uint8)


def _offsets(radius: int, sigma: float, degrees: float) -> dict[tuple[int, int], float]:
    """(rows, columns) → weight."""
    angle = math.radians(degrees)
    weights = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(2 * radius + 1)]
    total = sum(weights)
    offsets: dict[tuple[int, int], float] = {}
    for i, weight in enumerate(weights):
        place = (math.ceil(i * math.sin(angle) - 0.5), math.ceil(i * math.cos(angle) - 0.5))
        offsets[place] = offsets.get(place, 0.0) + weight / total
    return offsets
