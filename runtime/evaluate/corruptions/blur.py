"""Gaussian and defocus blur."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.evaluate.corruptions.pixels import truncate

__all__ = ["defocus_blur", "gaussian", "gaussian_blur"]


def gaussian(values: NDArray[Any], sigma: float) -> NDArray[np.float32]:
    """Smooths an HW or HWC array with a Gaussian cut off at 4σ; the border's values go on outside."""
    values = values.astype(np.float32, copy=False)
    side = 2 * int(4 * sigma + 0.5) + 1
    if side == 1:
        return values.copy()
    smoothed: NDArray[np.float32] = cv2.GaussianBlur(
        values, (side, side), sigma, sigmaY=sigma, borderType=cv2.BORDER_REPLICATE
    )
    return smoothed


def gaussian_blur(image_HWC: NDArray[np.uint8], sigma: float) -> NDArray[np.uint8]:
    """Blurs with a Gaussian of `sigma` pixels."""
    return truncate(gaussian(image_HWC, sigma))


def defocus_blur(image_HWC: NDArray[np.uint8], radius: float, softness: float) -> NDArray[np.uint8]:
    """Blurs with a disk of `radius` pixels whose edge a Gaussian of `softness` pixels smooths."""
    return truncate(cv2.filter2D(image_HWC.astype(np.float32), -1, _disk(radius, softness)))


@lru_cache(maxsize=32)
def _disk(radius: float, softness: float) -> NDArray[np.float32]:
    """Weights on 17 × 17 pixels, from a radius of 9 on as many as it needs.

    As in the original a soft edge that would lie outside is folded inside, so the weights' sum is up to 1.013.
    """
    reach = max(8, int(radius))
    along = np.arange(-reach, reach + 1)
    inside = (along[:, None] ** 2 + along**2 <= radius**2).astype(np.float32)
    side = 3 if radius <= 8 else 5
    disk: NDArray[np.float32] = cv2.GaussianBlur(inside / inside.sum(), (side, side), softness)
    return disk
