"""Pixelation and JPEG compression, both by Pillow."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["jpeg_compression", "pixelate"]

_NEAREST = Image.Resampling.NEAREST


def pixelate(image_HWC: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    """Shrinks the image to `scale` of its sides and enlarges it again, with box filters."""
    height, width = image_HWC.shape[:2]
    small = (max(1, int(width * scale)), max(1, int(height * scale)))
    shrunk = Image.fromarray(image_HWC).resize(small, Image.Resampling.BOX)
    back = Image.Resampling.BOX if _has_ties(small[0], width) or _has_ties(small[1], height) else _NEAREST
    return np.array(shrunk.resize((width, height), back))


def _has_ties(small: int, large: int) -> bool:
    """Whether any of `large` pixels' centers lies on a border between two of `small` pixels.

    Elsewhere a box enlarges as taking the nearest pixel does, which is quicker. A tie is a solution of
    (2i + 1) · small = 2k · large, so `small` must have more factors of two than `large`.
    """
    return (small & -small) > (large & -large)


def jpeg_compression(image_HWC: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """Encodes the image as JPEG of a `quality` from 1 to 95, and decodes it."""
    encoded = io.BytesIO()
    Image.fromarray(image_HWC).save(encoded, "JPEG", quality=quality)
    return np.array(Image.open(encoded, formats=("JPEG",)))
