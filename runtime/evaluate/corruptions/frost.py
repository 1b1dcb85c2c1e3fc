"""Frost: one of five photographs of frozen glass over the image.

The photographs are not ours to copy: they are read from the package `imagecorruptions-imaug`, which contains those of
the original. It is found through its metadata and never imported.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.errors import BackendUnavailable
from runtime.evaluate.corruptions.pixels import truncate

__all__ = ["frost"]

_PACKAGE = "imagecorruptions-imaug"
_TEXTURES = {
    "frost1.png": "ff9f907860bd7a83",
    "frost2.png": "fe211a89b336999c",
    "frost3.png": "2d0d50b4a9bb213f",
    "frost4.jpg": "3f8b91ca1a9fa716",
    "frost5.jpg": "5fc6a19df4a429ba",
}
"""File name → the start of its SHA-256. The original has a sixth photograph and never draws it."""

_INSTALL = (
    f"Install it with `pip install --no-deps {_PACKAGE}`. Without --no-deps (or with the extra `advprop[frost]`) pip "
    "also installs opencv-python, which overwrites the files of opencv-python-headless; either then works, but "
    "removing one breaks the other"
)


def frost(
    image_HWC: NDArray[np.uint8], kept: float, amount: float, scale: float, *, random: np.random.Generator
) -> NDArray[np.uint8]:
    """Adds a random part of a random texture.

    Args:
        image_HWC: uint8 RGB.
        kept: the weight of the image.
        amount: the weight of the texture.
        scale: the texture's size, 1 being that of its file. One that is still smaller than the image is enlarged.
        random: draws the texture and the part.

    Raises:
        BackendUnavailable: the package with the textures is missing, or has others.
    """
    height, width = image_HWC.shape[:2]
    texture = _texture(list(_TEXTURES)[int(random.integers(0, len(_TEXTURES)))], scale)
    texture = _at_least(texture, height + 1, width + 1)
    top = int(random.integers(0, texture.shape[0] - height))
    left = int(random.integers(0, texture.shape[1] - width))
    part = texture[top : top + height, left : left + width]
    return truncate(image_HWC * np.float32(kept) + part * np.float32(amount))


@lru_cache(maxsize=15)
def _texture(name: str, scale: float) -> NDArray[np.uint8]:
    """Returns a texture, uint8 RGB, from its file."""
    content = _file(name).read_bytes()
    if hashlib.sha256(content).hexdigest()[:16] != _TEXTURES[name]:
        raise BackendUnavailable(
            f"the frost texture {name} of {_PACKAGE} is not the original one, so results would not be comparable. "
            f"{_INSTALL}"
        )
    texture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert texture is not None, name
    if scale != 1:
        texture = cv2.resize(texture, (0, 0), fx=scale, fy=scale)
    return np.ascontiguousarray(texture[..., ::-1])


def _file(name: str) -> Path:
    try:
        path = Path(str(importlib.metadata.distribution(_PACKAGE).locate_file(f"imagecorruptions/frost/{name}")))
    except importlib.metadata.PackageNotFoundError as error:
        raise BackendUnavailable(
            f"frost needs the textures of the package {_PACKAGE}, which is not installed. {_INSTALL}"
        ) from error
    if not path.is_file():
        raise BackendUnavailable(f"the package {_PACKAGE} has no file {path}. {_INSTALL}")
    return path


def _at_least(texture: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    factor = max(height / texture.shape[0], width / texture.shape[1])
    if factor <= 1:
        return texture
    size = (max(width, round(texture.shape[1] * factor)), max(height, round(texture.shape[0] * factor)))
    return cv2.resize(texture, size, interpolation=cv2.INTER_CUBIC)  # type: ignore[no-any-return]
