"""One image, one corruption, one severity: `corrupt`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BackendUnavailable, ConfigError, DataError, nearest
from runtime.evaluate.corruptions.severities import CORRUPTIONS, EXTRAS, TABLES, table_for
from runtime.system.seeding import seed_from

__all__ = ["FIXED", "corrupt", "function_of"]

_HOMES = {
    "gaussian_noise": "noise",
    "shot_noise": "noise",
    "impulse_noise": "noise",
    "speckle_noise": "noise",
    "defocus_blur": "blur",
    "gaussian_blur": "blur",
    "glass_blur": "glass",
    "motion_blur": "motion",
    "zoom_blur": "zoom",
    "snow": "snow",
    "frost": "frost",
    "fog": "fog",
    "spatter": "spatter",
    "brightness": "color",
    "contrast": "color",
    "saturate": "color",
    "elastic_transform": "elastic",
    "pixelate": "digital",
    "jpeg_compression": "digital",
}
"""Corruption → the module that has a function of its name."""

FIXED = frozenset(
    {
        "defocus_blur",
        "gaussian_blur",
        "zoom_blur",
        "brightness",
        "contrast",
        "saturate",
        "pixelate",
        "jpeg_compression",
    }
)
"""Those that draw nothing."""


def corrupt(
    image_HWC: NDArray[np.uint8],
    name: str,
    severity: int,
    *,
    key: str | int = 0,
    seed: int = 0,
    table: str = "auto",
) -> NDArray[np.uint8]:
    """Returns a corrupted copy of an image.

    What is drawn follows from `seed`, `key`, `name` and `severity` alone, so any cell of an evaluation can be made
    again by itself, in any order and in any process. Other versions of NumPy, SciPy, OpenCV and Pillow may give
    slightly other pixels.

    Args:
        image_HWC: uint8 RGB of any height and width. It is not changed.
        name: one of `CORRUPTIONS` or `EXTRAS`.
        severity: 1 to 5.
        key: what tells this image from others: its path or its number. 1 and "1" are two keys.
        seed: another seed is another draw for every image.
        table: `imagenet`, `tiny` or `cifar`; `auto` takes the one for the image's size, see `table_for`.

    Returns:
        uint8 RGB of the same shape.

    Raises:
        ConfigError: an unknown name or table, an impossible severity, key or seed.
        DataError: not a uint8 RGB array.
        BackendUnavailable: OpenCV or SciPy is missing, or for `frost` its textures.
    """
    _check_image(image_HWC)
    _check_choices(name, severity, table)
    height, width = image_HWC.shape[:2]
    arguments = TABLES[table_for(height, width) if table == "auto" else table][name][severity - 1]
    function = function_of(name)
    result: NDArray[np.uint8]
    if name in FIXED:
        result = function(image_HWC, *arguments)
    else:
        result = function(image_HWC, *arguments, random=_generator(seed, key, name, severity))
    assert result.shape == image_HWC.shape and result.dtype == np.uint8, name
    return result


def _generator(seed: int, key: str | int, name: str, severity: int) -> np.random.Generator:
    """A generator for one cell: Python's own hash would differ from process to process."""
    if not isinstance(key, str | int | np.integer):
        raise ConfigError(f"the key of an image to corrupt must be a text or a whole number; found {key!r}")
    if not isinstance(seed, int | np.integer):
        raise ConfigError(f"the seed of a corruption must be a whole number; found {seed!r}")
    cell = seed_from(int(seed), key if isinstance(key, str) else int(key), name, int(severity))
    return np.random.Generator(np.random.SFC64(cell))


@cache
def function_of(name: str) -> Callable[..., Any]:
    try:
        home = importlib.import_module(f"runtime.evaluate.corruptions.{_HOMES[name]}")
    except ImportError as error:
        raise BackendUnavailable(
            f"{name} needs OpenCV and SciPy: {error}. Install them with `pip install opencv-python-headless scipy`"
        ) from error
    function: Callable[..., Any] = getattr(home, name)
    return function


def _check_image(image: object) -> None:
    if not isinstance(image, np.ndarray):
        raise DataError(f"an image to corrupt must be a NumPy array, uint8 HWC RGB; found {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise DataError(
            f"an image to corrupt must be uint8 of shape (height, width, 3), RGB; found {image.dtype} of shape "
            f"{image.shape}. Corruptions come before normalization: give the pixels that the network's input is made of"
        )


def _check_choices(name: str, severity: int, table: str) -> None:
    if not isinstance(name, str) or name not in _HOMES:
        known = (*CORRUPTIONS, *EXTRAS)
        hint = nearest(str(name), known)
        raise ConfigError(f"no corruption {name!r}; {hint or 'there are ' + ', '.join(known)}")
    if isinstance(severity, bool) or not isinstance(severity, int | np.integer) or not 1 <= severity <= 5:
        raise ConfigError(f"a corruption's severity must be 1, 2, 3, 4 or 5; found {severity!r}")
    if table != "auto" and table not in TABLES:
        raise ConfigError(f"no table {table!r} of severities; expected auto, {', '.join(TABLES)}")
