"""Elastic transform, pixelation and JPEG compression.

Shape suffixes: N fields, H height, W width, C channels.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from runtime.evaluate.corruptions.pixelwise import truncate

__all__ = ["elastic_transform", "jpeg_compression", "pixelate", "smooth"]

_CUTOFF = 3
"""Radius at which the smoothing Gaussian is cut off, in standard deviations."""


def elastic_transform(
    image_HWC: NDArray[np.uint8], amplitude: float, sigma: float, shift: float, *, random: np.random.Generator
) -> NDArray[np.uint8]:
    """Apply a random affine map, then a smooth random displacement of every pixel.

    Args:
        image_HWC: uint8 RGB.
        amplitude: displacement in pixels before smoothing, which removes most of it.
        sigma: standard deviation of the Gaussian that smooths the displacement, in pixels.
        shift: maximum shift of three reference points along each axis, in pixels.
        random: source of the affine map and the displacement.
    """
    import cv2

    height, width = image_HWC.shape[:2]
    image = cv2.warpAffine(
        image_HWC.astype(np.float32),
        _random_affine(height, width, shift, random),
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


def _random_affine(height: int, width: int, shift: float, random: np.random.Generator) -> NDArray[np.float64]:
    """Return a map that moves three corners of a central square by up to `shift` per axis."""
    import cv2

    x, y, half = width // 2, height // 2, min(height, width) // 3
    corners = np.array([[x + half, y + half], [x + half, y - half], [x - half, y - half]], np.float32)
    moved = corners + random.uniform(-shift, shift, size=(3, 2)).astype(np.float32)
    if half == 0:  # the three corners are the same point
        return np.array([[1, 0, moved[0, 0] - x], [0, 1, moved[0, 1] - y]], np.float64)
    return cv2.getAffineTransform(corners, moved)  # type: ignore[no-any-return]


def smooth(fields_NHW: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """Smooth each field with a Gaussian; the fields are mirrored at their borders.

    With mirrored borders, a symmetric filter multiplies each coefficient of the cosine transform
    (DCT-II) by a number. A Gaussian wider than the image, which the original code uses, therefore
    costs no more than a narrow one.
    """
    import scipy.fft

    transformed = scipy.fft.dctn(fields_NHW, axes=(1, 2), norm="ortho")
    transformed *= _gaussian_response(fields_NHW.shape[1], sigma)[:, None]
    transformed *= _gaussian_response(fields_NHW.shape[2], sigma)
    smoothed: NDArray[np.float32] = scipy.fft.idctn(transformed, axes=(1, 2), norm="ortho")
    return smoothed


@lru_cache(maxsize=32)
def _gaussian_response(side: int, sigma: float) -> NDArray[np.float32]:
    """Return the factor by which a Gaussian scales each cosine over `side` pixels."""
    offsets = np.arange(int(_CUTOFF * sigma + 0.5) + 1)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    weights[1:] *= 2
    weights /= weights.sum()
    cosines = np.cos(np.pi / side * np.outer(np.arange(side), offsets))
    response: NDArray[np.float32] = (cosines @ weights).astype(np.float32)
    return response


def pixelate(image_HWC: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    """Shrink the image to `scale` of its sides and enlarge it again, both with box filters."""
    from PIL import Image

    height, width = image_HWC.shape[:2]
    small = (max(1, int(width * scale)), max(1, int(height * scale)))
    shrunk = Image.fromarray(image_HWC).resize(small, Image.Resampling.BOX)
    has_ties = _has_ties(small[0], width) or _has_ties(small[1], height)
    enlarging = Image.Resampling.BOX if has_ties else Image.Resampling.NEAREST
    return np.array(shrunk.resize((width, height), enlarging))


def _has_ties(small: int, large: int) -> bool:
    """Return whether the center of any of `large` pixels is on a border of the `small` pixels.

    Without ties, a box filter enlarges exactly as nearest-neighbor interpolation does, which is
    faster. A tie is a solution of (2i + 1) · small = 2k · large, so it needs more factors of two in
    `small` than in `large`.
    """
    return (small & -small) > (large & -large)


def jpeg_compression(image_HWC: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """Encode the image as JPEG with a `quality` from 1 to 95, and decode it."""
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(image_HWC).save(encoded, "JPEG", quality=quality)
    return np.array(Image.open(encoded, formats=("JPEG",)))
