"""The images that contestants are given: pixels at the network's size, and encoded ones of a camera's.

Shape suffixes: N images, H height, W width, C channels.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.errors import DataError
from runtime.preprocessing import SUFFIXES, image_size

__all__ = ["SYNTHETIC", "encoded_images", "pixels"]

SYNTHETIC = "made, JPEG of 640×427 pixels, quality 90"
_WIDTH, _HEIGHT = 640, 427


def pixels(count: int, size: tuple[int, int], seed: int) -> NDArray[np.uint8]:
    """Returns noise, (count, H, W, 3): not zeros, with which GPUs use less power and CPUs may take another path."""
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def encoded_images(count: int, folder: Path | None, seed: int) -> list[bytes]:
    """Returns encoded images, with repetitions where there are fewer.

    Args:
        count: how many.
        folder: image files, at any depth, taken in the order of their names; None: made ones, smooth with some noise,
            so that they decode like photographs.
        seed: of the made ones.

    Raises:
        DataError: no image files, or one that is none.
    """
    if folder is None:
        return [_made(number, seed) for number in range(count)]
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(f"{folder} holds no image files ({', '.join(SUFFIXES)})")
    paths = paths[:count]
    for path in paths:
        image_size(path)
    return [paths[number % len(paths)].read_bytes() for number in range(count)]


def _made(number: int, seed: int) -> bytes:
    from PIL import Image

    random = np.random.default_rng([seed, number])
    coarse = Image.fromarray(random.integers(0, 256, (24, 36, 3), dtype=np.uint8))
    smooth_HWC = np.asarray(coarse.resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC), np.float32)
    noisy_HWC = np.clip(smooth_HWC + random.normal(0, 6, smooth_HWC.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy_HWC).save(file, "JPEG", quality=90)
    return file.getvalue()
