"""The images that targets run on: pixels at the network's input size, and encoded images.

Shape suffixes: N images, H height, W width, C channels.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.system.decode import image_size
from runtime.system.image_sources import image_paths

__all__ = ["SYNTHETIC", "encoded_images", "pixels"]

SYNTHETIC = "synthetic JPEG images of 640×427 pixels, quality 90"
"""Describes the generated images."""
_WIDTH, _HEIGHT = 640, 427


def pixels(count: int, size: tuple[int, int], seed: int) -> NDArray[np.uint8]:
    """Return uint8 noise, (count, H, W, 3). Zeros would use less power or other code paths."""
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def encoded_images(count: int, folder: Path | None, seed: int) -> list[bytes]:
    """Return encoded images; images are repeated if there are not enough.

    Args:
        count: number of images.
        folder: folder of image files, which are sorted by path (default: generate smooth images
            with some noise, which decode about as fast as photographs).
        seed: seed of the generated images.

    Raises:
        DataError: the folder has no image files, or a file is not an image.
    """
    if folder is None:
        return [_synthetic_image(number, seed) for number in range(count)]
    paths = image_paths(folder)[:count]
    for path in paths:
        image_size(path)
    return [paths[number % len(paths)].read_bytes() for number in range(count)]


def _synthetic_image(number: int, seed: int) -> bytes:
    from PIL import Image

    random = np.random.default_rng([seed, number])
    coarse = Image.fromarray(random.integers(0, 256, (24, 36, 3), dtype=np.uint8))
    smooth_HWC = np.asarray(coarse.resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC), np.float32)
    noisy_HWC = np.clip(smooth_HWC + random.normal(0, 6, smooth_HWC.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy_HWC).save(file, "JPEG", quality=90)
    return file.getvalue()
