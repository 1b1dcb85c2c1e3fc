"""`corrupt`: apply one corruption at one severity to one image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BackendUnavailable, ConfigError, DataError, nearest
from runtime.evaluate.corruptions import blur, digital, pixelwise, weather
from runtime.evaluate.corruptions.severities import CORRUPTIONS, EXTRAS, TABLES, table_for
from runtime.system.seeding import seed_from

__all__ = ["DETERMINISTIC", "FUNCTIONS", "corrupt"]

FUNCTIONS: dict[str, Callable[..., NDArray[np.uint8]]] = {
    "gaussian_noise": pixelwise.gaussian_noise,
    "shot_noise": pixelwise.shot_noise,
    "impulse_noise": pixelwise.impulse_noise,
    "speckle_noise": pixelwise.speckle_noise,
    "defocus_blur": blur.defocus_blur,
    "gaussian_blur": blur.gaussian_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "spatter": weather.spatter,
    "brightness": pixelwise.brightness,
    "contrast": pixelwise.contrast,
    "saturate": pixelwise.saturate,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
}
"""Corruption → function of the image and the parameters of a severity. Functions that are not
deterministic also take `random`."""

DETERMINISTIC = frozenset(
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
"""Corruptions that use no random numbers."""


def corrupt(
    image_HWC: NDArray[np.uint8],
    name: str,
    severity: int,
    *,
    key: str | int = 0,
    seed: int = 0,
    table: str = "auto",
) -> NDArray[np.uint8]:
    """Return a corrupted copy of an image.

    The random numbers depend only on `seed`, `key`, `name` and `severity`, so any cell of an
    evaluation can be computed again in any order and in any process. Other versions of NumPy,
    SciPy, OpenCV and Pillow may return slightly different pixels.

    Args:
        image_HWC: uint8 RGB of any height and width. It is not changed.
        name: one of `CORRUPTIONS` or `EXTRAS`.
        severity: 1 to 5.
        key: identifies the image, such as its path or number. 1 and "1" are different keys.
        seed: seed of the random numbers of all images.
        table: `imagenet`, `tiny` or `cifar`; `auto` selects the table for the image's size, see
            `table_for`.

    Returns:
        uint8 RGB of the same shape.

    Raises:
        ConfigError: the name, table, severity, key or seed is invalid.
        DataError: the image is not a uint8 RGB array.
        BackendUnavailable: OpenCV, SciPy, Pillow or the textures of `frost` are missing.
    """
    _check_image(image_HWC)
    _check_choices(name, severity, table)
    height, width = image_HWC.shape[:2]
    arguments = TABLES[table_for(height, width) if table == "auto" else table][name][severity - 1]
    options = {} if name in DETERMINISTIC else {"random": _generator(seed, key, name, severity)}
    try:
        result = FUNCTIONS[name](image_HWC, *arguments, **options)
    except ImportError as error:
        raise BackendUnavailable(
            f"{name} needs OpenCV and SciPy: {error}. Install them with `pip install opencv-python-headless scipy`"
        ) from error
    assert result.shape == image_HWC.shape and result.dtype == np.uint8, name
    return result


def _generator(seed: int, key: str | int, name: str, severity: int) -> np.random.Generator:
    """Return the generator of one cell. Python's own hash would differ between processes."""
    if not isinstance(key, str | int | np.integer):
        raise ConfigError(f"the key of an image must be a string or an integer; found {key!r}")
    if not isinstance(seed, int | np.integer):
        raise ConfigError(f"the seed of a corruption must be an integer; found {seed!r}")
    cell = seed_from(int(seed), key if isinstance(key, str) else int(key), name, int(severity))
    return np.random.Generator(np.random.SFC64(cell))


def _check_image(image: object) -> None:
    if not isinstance(image, np.ndarray):
        raise DataError(f"expected an image as a NumPy array, uint8 HWC RGB; found {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise DataError(
            f"expected an image as uint8 of shape (height, width, 3), RGB; found {image.dtype} of shape {image.shape}. "
            "Corrupt the pixels before they are normalized"
        )


def _check_choices(name: Any, severity: Any, table: str) -> None:
    if not isinstance(name, str) or name not in FUNCTIONS:
        known = (*CORRUPTIONS, *EXTRAS)
        hint = nearest(str(name), known)
        raise ConfigError(f"unknown corruption {name!r}; {hint or 'expected one of ' + ', '.join(known)}")
    if isinstance(severity, bool) or not isinstance(severity, int | np.integer) or not 1 <= severity <= 5:
        raise ConfigError(f"the severity of a corruption must be 1, 2, 3, 4 or 5; found {severity!r}")
    if table != "auto" and table not in TABLES:
        raise ConfigError(f"unknown table of severities {table!r}; expected auto, {', '.join(TABLES)}")
