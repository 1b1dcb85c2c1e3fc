"""Decode, resize, crop and normalize images, bit-equal to timm's evaluation transform.

timm builds its transform from torchvision's Resize and CenterCrop on PIL images. This module makes
the same PIL calls with the same rounding, and imports neither timm nor torchvision.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import DataError
from runtime.spec import ModelSpec, Preprocessing
from runtime.system.decode import MAX_PIXELS, ImageLike, decode

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Preprocessor", "decode_and_fit", "fit_to_input", "normalize"]


def decode_and_fit(
    image: ImageLike, spec: Preprocessing, name: str = "the image", max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """Decode an image of any size, and resize and crop it to the network's input size.

    Args:
        image: an image, as `runtime.system.decode.decode` reads it.
        spec: the network's preprocessing. Its `exif` decides about the EXIF orientation.
        name: name of encoded bytes in error messages.
        max_pixels: maximum size of an encoded image.

    Returns:
        uint8 RGB of shape (spec.height, spec.width, 3).

    Raises:
        DataError: see `decode` and `fit_to_input`.
    """
    return fit_to_input(decode(image, name, exif=spec.exif, max_pixels=max_pixels), spec)


def fit_to_input(image: Image, spec: Preprocessing) -> NDArray[np.uint8]:
    """Resize and crop an RGB image to the network's input size.

    Returns:
        uint8 RGB of shape (spec.height, spec.width, 3).

    Raises:
        DataError: the image is so long and narrow that resizing it would exhaust the memory.
    """
    from PIL import Image

    resample = Image.Resampling[spec.interpolation.upper()]
    # timm floors size / crop_pct (create_transform), then torchvision takes int() of the
    # scaled long side (functional._compute_resized_output_size).
    scaled_h = math.floor(spec.height / spec.crop_pct)
    scaled_w = math.floor(spec.width / spec.crop_pct)
    if spec.crop_mode == "squash":
        image = _resize(image, (scaled_w, scaled_h), resample)
    elif spec.crop_mode == "center" and scaled_h == scaled_w:
        image = _resize_short_side(image, scaled_h, resample)
    else:
        image = _resize_keep_ratio(image, scaled_h, scaled_w, spec.crop_mode, resample)
    fill = [min(max(round(255 * value), 0), 255) for value in spec.mean] if spec.crop_mode == "border" else [0, 0, 0]
    return _crop_or_pad(np.asarray(image), spec.height, spec.width, fill)


def _resize_short_side(image: Image, size: int, resample: Any) -> Image:
    width, height = image.size
    if min(width, height) == size:
        return image
    short, long = min(width, height), max(width, height)
    new_long = int(size * long / short)
    return _resize(image, (size, new_long) if width <= height else (new_long, size), resample)


def _resize_keep_ratio(image: Image, height: int, width: int, crop_mode: str, resample: Any) -> Image:
    """Resize like timm's ResizeKeepRatio: cover the target (`center`) or fit in (`border`)."""
    image_w, image_h = image.size
    ratio_h, ratio_w = image_h / height, image_w / width
    ratio = max(ratio_h, ratio_w) if crop_mode == "border" else min(ratio_h, ratio_w)
    size = (max(1, round(image_w / ratio)), max(1, round(image_h / ratio)))
    return image if size == image.size else _resize(image, size, resample)


def _resize(image: Image, size: tuple[int, int], resample: Any) -> Image:
    if size[0] * size[1] > MAX_PIXELS:  # an image one pixel wide could exhaust the memory
        raise DataError(
            f"an image of {image.width}×{image.height} pixels is too long and narrow to classify: before cropping it "
            f"would be resized to {size[0]}×{size[1]}, which exceeds {MAX_PIXELS / 1e6:.0f} megapixels"
        )
    return image.resize(size, resample)


def _crop_or_pad(image_HWC: NDArray[np.uint8], height: int, width: int, fill: Sequence[int]) -> NDArray[np.uint8]:
    """Crop like torchvision's CenterCrop or timm's CenterCropOrPad; pad with `fill`."""
    image_h, image_w = image_HWC.shape[:2]
    if image_h < height or image_w < width:
        top, left = max(height - image_h, 0) // 2, max(width - image_w, 0) // 2
        canvas_HWC = np.empty((max(height, image_h), max(width, image_w), 3), np.uint8)
        canvas_HWC[:] = np.asarray(fill, np.uint8)
        canvas_HWC[top : top + image_h, left : left + image_w] = image_HWC
        image_HWC = canvas_HWC
        image_h, image_w = image_HWC.shape[:2]
    top = int(round((image_h - height) / 2.0))
    left = int(round((image_w - width) / 2.0))
    return np.ascontiguousarray(image_HWC[top : top + height, left : left + width])


def normalize(images_NHWC: NDArray[np.uint8], spec: Preprocessing) -> NDArray[np.float32]:
    """Scale pixels to [0, 1] and normalize each channel.

    Args:
        images_NHWC: uint8 RGB, (N, H, W, 3).
        spec: provides the mean and standard deviation of each channel.

    Returns:
        float32, (N, 3, H, W), contiguous.
    """
    images_NCHW = np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2)).astype(np.float32)
    mean = np.asarray(spec.mean, np.float32).reshape(1, 3, 1, 1)
    std = np.asarray(spec.std, np.float32).reshape(1, 3, 1, 1)
    images_NCHW /= np.float32(255)
    images_NCHW -= mean
    images_NCHW /= std
    return images_NCHW


@dataclass(frozen=True, slots=True)
class Preprocessor:
    """Converts images of any type and size to the input of a network or model file."""

    spec: Preprocessing
    """Input size, crop, interpolation, mean and standard deviation."""
    input_form: str = "float32 NCHW"
    """Input of the model file, one of `runtime.spec.INPUT_FORMS`."""
    max_pixels: int = MAX_PIXELS
    """Maximum size of an encoded image, in pixels."""

    @classmethod
    def of(cls, spec: ModelSpec, max_pixels: int = MAX_PIXELS) -> Preprocessor:
        """Return the preprocessor of a model file."""
        return cls(spec.preprocessing, spec.input_form, max_pixels)

    def __call__(self, images: Sequence[ImageLike]) -> NDArray[Any]:
        """Decode, resize, crop and convert images.

        Returns:
            The model's input, with N = len(images) and the dtype and layout of `input_form`.

        Raises:
            DataError: an image cannot be decoded; the message names it.
        """
        return self.convert(self.fit(images))

    def fit(self, images: Sequence[ImageLike]) -> NDArray[np.uint8]:
        """Decode, resize and crop images.

        Returns:
            uint8 RGB, (len(images), spec.height, spec.width, 3).

        Raises:
            DataError: an image cannot be decoded; the message names it.
        """
        fitted = [decode_and_fit(image, self.spec, max_pixels=self.max_pixels) for image in images]
        return np.stack(fitted) if fitted else np.empty((0, self.spec.height, self.spec.width, 3), np.uint8)

    def convert(self, images_NHWC: NDArray[np.uint8]) -> NDArray[Any]:
        """Convert uint8 RGB images of the network's size, (N, H, W, 3), to the model's input."""
        if self.input_form == "uint8 NHWC":
            return images_NHWC
        if self.input_form == "uint8 NCHW":
            return np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2))
        images_NCHW = normalize(images_NHWC, self.spec)
        return images_NCHW.astype(np.float16) if self.input_form == "float16 NCHW" else images_NCHW
