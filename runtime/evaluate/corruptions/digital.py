"""Pixelation and JPEG compression, both by Pillow."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["jpeg_compression", "pixelate"]


def pixelate(image_HWC: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    """Shrinks the image to `scale` of its sides and enlarges it again, with box filters."""
    height, width = image_HWC.shape[:2]
    small = Image.fromarray(image_HWC).resize(
        (max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BOX
    )
    return np.array(small.resize((width, height), Image.Resampling.BOX))


def jpeg_compression(image_HWC: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """Encodes the image as JPEG of a `quality` from 1 to 95, and decodes it."""
    encoded = io.BytesIO()
    Image.fromarray(image_HWC).save(encoded, "JPEG", quality=quality)
    return np.array(Image.open(encoded))
