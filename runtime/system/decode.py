"""Decode images, which may be damaged or malicious, to RGB. Every package decodes with `decode`.

Nothing is decoded before the size in the file's header is known to be within a limit, and only the
formats in FORMATS are opened: Pillow would start Ghostscript for EPS, even if its name ends in
`.png`.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from runtime.errors import DataError, first_line
from runtime.system.files import no_such

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FORMATS", "MAX_PIXELS", "ImageLike", "decode", "image_size"]

MAX_PIXELS = 100_000_000
"""Default limit for the size of an image. Its decoding takes at most about 1 GB."""

_MEMORY = {"WEBP": 2, "AVIF": 2, "JPEG2000": 4}
"""Format → memory per pixel that its decoder needs, relative to the other formats."""

_MODULES = {
    "JPEG": "Jpeg",
    "PNG": "Png",
    "WEBP": "WebP",
    "BMP": "Bmp",
    "TIFF": "Tiff",
    "GIF": "Gif",
    "PPM": "Ppm",
    "JPEG2000": "Jpeg2K",
    "AVIF": "Avif",
}
"""Pillow's name of a format → the name of its module. Old releases of Pillow lack AVIF."""

FORMATS = tuple(_MODULES)
"""The formats that are decoded, by Pillow's names. Of animations, the first frame is used."""

_ORIENTATION = 0x0112
"""EXIF tag: how a viewer flips or rotates the pixels. 1 leaves them as they are."""
_SIXTEEN_BITS = 65535
_TIFF_BITS, _TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT = 258, 322, 323

ImageLike: TypeAlias = "str | PathLike[str] | bytes | NDArray[np.uint8] | Image"
"""A path, the bytes of an encoded file, a uint8 array, RGB (H, W, 3) or gray (H, W), or a PIL
image."""


def decode(image: ImageLike, name: str = "the image", *, exif: str = "ignore", max_pixels: int = MAX_PIXELS) -> Image:
    """Return an image as an RGB PIL image.

    Gray images with 16 bits per pixel are scaled to 8 bits, and so are floating-point images with
    values in [0, 1].

    Args:
        image: a path, the bytes of an encoded file, a uint8 array or a PIL image.
        name: name of encoded bytes in error messages.
        exif: `upright` applies the orientation in the EXIF data, as viewers do; `ignore` does not,
            as in torchvision and timm. Pillow always applies that of a TIFF file.
        max_pixels: maximum size of an encoded image. Larger images are not decoded. It is half as
            large for WebP and AVIF, and a quarter for JPEG 2000, which need more memory. Pillow's
            own limit, 2 × `PIL.Image.MAX_IMAGE_PIXELS`, applies too.

    Raises:
        DataError: the file does not exist, is not an image, is truncated or too large, or the array
            has the wrong dtype or shape.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        with _data_errors(name):
            return _rgb(image, exif)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if not isinstance(image, str | PathLike | bytes):
        raise DataError(
            f"expected an image as a path, bytes, a uint8 array or a PIL image; found {type(image).__name__}"
        )
    with _open(image, name, max_pixels) as opened:
        return _rgb(opened, exif)


def image_size(image: ImageLike) -> tuple[int, int]:
    """Return (width, height) in pixels, before the EXIF orientation. Files are not decoded.

    Raises:
        DataError: see `decode`.
    """
    if isinstance(image, str | PathLike | bytes):
        with _open(image, "the image", MAX_PIXELS) as opened:
            return opened.size
    return decode(image).size


@contextmanager
def _data_errors(name: str) -> Iterator[None]:
    """Convert everything that Pillow raises to DataError. Damaged files cause many kinds."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(no_such("image file", name)) from error
    except UnidentifiedImageError as error:
        expected = ", ".join(_formats())
        raise DataError(f"cannot decode {name}: Pillow does not recognize its format, one of {expected}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} has too many pixels: {first_line(error)}") from error
    except Exception as error:
        raise DataError(f"cannot decode {name}: {first_line(error)}") from error


@contextmanager
def _open(image: str | PathLike[str] | bytes, name: str, max_pixels: int) -> Iterator[Image]:
    """Open an encoded image whose size is within the limit, without decoding it."""
    from PIL import Image

    if not isinstance(image, bytes):
        name = str(Path(image))
    with _data_errors(name):
        source: Any = io.BytesIO(image) if isinstance(image, bytes) else name
        with Image.open(source, formats=_formats()) as opened:
            _check_size(opened, name, max_pixels)
            yield opened


@cache
def _formats() -> tuple[str, ...]:
    """Load Pillow's modules for FORMATS, and return the formats that it supports."""
    from PIL import Image

    for module in _MODULES.values():
        try:
            importlib.import_module(f"PIL.{module}ImagePlugin")
        except ImportError:  # a release without this format
            continue
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_size(opened: Image, name: str, max_pixels: int) -> None:
    width, height = opened.size
    limit = max_pixels // _MEMORY.get(opened.format or "", 1)
    tags = getattr(opened, "tag_v2", {})  # a tile of a TIFF file may be larger than the image
    sizes = [(width, height), (tags.get(_TIFF_TILE_WIDTH, 1), tags.get(_TIFF_TILE_HEIGHT, 1))]
    if opened.format == "JPEG2000":
        sizes += _codestream_sizes(opened)
    for wide, high in sizes:
        if wide * high > limit:
            raise DataError(
                f"{name} has {wide}×{high} pixels; the limit is {limit:,} pixels. Make it smaller, or raise "
                "max_pixels of runtime.load"
            )


def _codestream_sizes(opened: Any) -> Iterator[tuple[int, int]]:
    """Yield the sizes inside a JPEG 2000 file, which is decoded even if its header has another."""
    position = opened.fp.tell()
    opened.fp.seek(0)
    # Start of codestream and of its `SIZ` marker segment; then its length and capabilities.
    for start in opened.fp.read().split(b"\xff\x4f\xff\x51")[1:]:
        yield int.from_bytes(start[4:8]), int.from_bytes(start[8:12])
    opened.fp.seek(position)


def _rgb(image: Image, exif: str) -> Image:
    """Convert decoded pixels to upright, 8-bit RGB. May return an image that shares its pixels."""
    from PIL import ImageOps

    depth = _depth(image)
    rgb = image.convert("RGB") if depth is None else _from_gray(np.asarray(image), depth, image.info)
    if exif == "upright" and _orientation(rgb) != 1:
        return ImageOps.exif_transpose(rgb)
    return rgb


def _orientation(image: Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data, next to pixels that are fine
        return 1
    return int(found) if found in range(1, 9) else 1


def _depth(image: Image) -> int | None:
    """Return the white level of a gray image with more than 8 bits; None for all other images."""
    if image.mode == "F":
        return 1
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        bits = tags.get(_TIFF_BITS, (16,))[0]  # 12 in some TIFF files
        return int(2 ** int(bits)) - 1
    if image.mode == "I":
        # Old releases of Pillow open 16-bit PNG files in this mode. For others, the level is unknown.
        return _SIXTEEN_BITS if image.format in ("PNG", "PPM") else 255
    return None


def _from_gray(gray_HW: NDArray[Any], white: int, info: dict[Any, Any]) -> Image:
    """Scale gray values from [0, white] to 8 bits."""
    from PIL import Image

    low, high = gray_HW.min(), gray_HW.max()
    if not (low >= 0 and high <= white):
        raise DataError(
            f"a gray image of type {gray_HW.dtype} needs values from 0 to {white}; found {low} to {high}. Convert it "
            "to 8 or 16 bits"
        )
    scaled_HW = np.rint(gray_HW * (255 / white)).astype(np.uint8)
    image = Image.fromarray(scaled_HW).convert("RGB")
    image.info = info
    return image


def _from_array(array: NDArray[Any]) -> Image:
    from PIL import Image

    gray = array.ndim == 2
    color = array.ndim == 3 and array.shape[2] == 3
    if array.dtype != np.uint8 or not (gray or color) or array.size == 0:
        raise DataError(
            f"an image array must be uint8 of shape (height, width, 3), RGB, or (height, width); "
            f"found {array.dtype} of shape {array.shape}. Pass preprocessed tensors to Session.run"
        )
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")
