"""Elastic transform: a random affine map, then a smooth random displacement of every pixel."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
import scipy.fft
from numpy.typing import NDArray

from runtime.evaluate.corruptions.pixels import truncate

__all__ = ["elastic_transform"]

_REACH = 3
"""Where the Gaussian is cut off, in standard deviations."""


def elastic_transform(
    image_HWC: NDArray[np.uint8], amplitude: float, sigma: float, shift: float, *, random: np.random.Generator
) -> NDArray[np.uint8]:
    """Distorts the image.

    Args:
        image_HWC: uint8 RGB.
        amplitude: of the displacement, in pixels, before smoothing takes most of it away.
        sigma: of the Gaussian that smooths the displacement, in pixels.
        shift: how far three points of the image move at most, along each axis, in pixels.
        random: draws moves and displacements.
    """
    height, width = image_HWC.shape[:2]
    image = cv2.warpAffine(
        image_HWC.astype(np.float32),
        _affine(height, width, shift, random),
        (width, height),
        borderMode=cv2.BORDER_REFLECT_101,
    )
    if amplitude == 0:
        return truncate(image)
    noise = random.random((2, height, width), dtype=np.float32)
    noise *= 2
    noise -= 1
    across, down = smooth(noise, sigma) * np.float32(amplitude)
    across += np.arange(width, dtype=np.float32)
    down += np.arange(height, dtype=np.float32)[:, None]
    return truncate(cv2.remap(image, across, down, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT))


def _affine(height: int, width: int, shift: float, random: np.random.Generator) -> NDArray[np.float64]:
    """The map that moves three corners of a square around the center by up to `shift` along each axis."""
    x, y, half = width // 2, height // 2, min(height, width) // 3
    corners = np.array([[x + half, y + half], [x + half, y - half], [x - half, y - half]], np.float32)
    moved = corners + random.uniform(-shift, shift, size=(3, 2)).astype(np.float32)
    if half == 0:  # three times the same point
        return np.array([[1, 0, moved[0, 0] - x], [0, 1, moved[0, 1] - y]], np.float64)
    return cv2.getAffineTransform(corners, moved)  # type: ignore[no-any-return]


def smooth(fields_NHW: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """Smooths each field with a Gaussian; outside, fields go on as their own mirror images.

    With such borders a symmetric filter multiplies each coefficient of the cosine transform (DCT-II) by a number.
    So a Gaussian wider than the image, which the original has, costs no more than a narrow one.
    """
    transformed = scipy.fft.dctn(fields_NHW, axes=(1, 2), norm="ortho")
    transformed *= _response(fields_NHW.shape[1], sigma)[:, None]
    transformed *= _response(fields_NHW.shape[2], sigma)
    smoothed: NDArray[np.float32] = scipy.fft.idctn(transformed, axes=(1, 2), norm="ortho")
    return smoothed


@lru_cache(maxsize=32)
def _response(side: int, sigma: float) -> NDArray[np.float32]:
    """What is left of each cosine of `side` pixels when a Gaussian has smoothed it."""
    offsets = np.arange(int(_REACH * sigma + 0.5) + 1)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    weights[1:] *= 2
    weights /= weights.sum()
    cosines = np.cos(np.pi / side * np.outer(np.arange(side), offsets))
    response: NDArray[np.float32] = (cosines @ weights).astype(np.float32)
    return response
