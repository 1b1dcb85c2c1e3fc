"""Zoom blur: the mean of the image and of ever larger views of its center.

A view is what `scipy.ndimage.zoom` of order 1 makes of the central part: its first and last pixel become the first
and last of the larger image, of which the center is kept. Linear interpolation is separable, so the rows are done
first and then the columns.
"""

from __future__ import annotations

import math
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.evaluate.corruptions.pixels import truncate

__all__ = ["enlarge", "zoom_blur"]


def zoom_blur(image_HWC: NDArray[np.uint8], last: float, step: float) -> NDArray[np.uint8]:
    """Averages the image with views at 1, 1 + `step`, …, below `last`."""
    factors = np.arange(1, last, step)
    image = image_HWC.astype(np.float32)
    total = 2 * image  # itself, and the view at factor 1
    for factor in factors[1:]:
        total += enlarge(image, float(factor))
    total /= len(factors) + 1
    return truncate(total)


def enlarge(image: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    """Returns the center of an image, `factor` times as large, at the size of the whole.

    Args:
        image: float32, HW or HWC.
        factor: at least 1.
    """
    by_row = _interpolate(image, factor)
    return cv2.transpose(_interpolate(cv2.transpose(by_row), factor))  # type: ignore[no-any-return]


def _interpolate(image: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    """Enlarges along the first axis."""
    lower, weight = _taps(image.shape[0], factor)
    shape = (-1, *[1] * (image.ndim - 1))
    result: NDArray[np.float32] = image[np.minimum(lower + 1, image.shape[0] - 1)]
    below = image[lower]
    result -= below
    result *= weight.reshape(shape)
    result += below
    return result


@lru_cache(maxsize=256)
def _taps(side: int, factor: float) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """For each pixel of the view, the one before its position and how far it is on the way to the next."""
    part = math.ceil(side / factor)
    large = round(part * factor)
    positions = (np.arange(side) + (large - side) // 2) * ((part - 1) / max(1, large - 1))
    lower = np.clip(np.floor(positions).astype(np.intp), 0, max(0, part - 2))
    return lower + (side - part) // 2, (positions - lower).astype(np.float32)
