"""Training data: encoded images with labels and class names.

embedded_digits   the digits of scikit-learn
train.folders     train/CLASS/*, val/CLASS/*; CLASS/*; lists of files
train.archives    tar files with the same layout, or WebDataset shards
train.datasets    torchvision, Hugging Face and TFDS names, through timm
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload, runtime_checkable

import numpy as np
from timm.data import ImageNetInfo
from timm.utils.misc import natural_key

from runtime.errors import ConfigError, DataError
from runtime.spec import Preprocessing
from runtime.system.decode import ImageLike, image_size
from runtime.system.image_sources import SUFFIXES, spread
from train.config import DataConfig
from train.split import Split

__all__ = [
    "ImageData",
    "ImageSet",
    "ImageStream",
    "Images",
    "NamedImages",
    "Origin",
    "by_class",
    "choose_preprocessing",
    "class_names",
    "class_wnids",
    "embedded_digits",
    "median_short_side",
]

log = logging.getLogger(__name__)

_Item = TypeVar("_Item")
_WNID = re.compile(r"n\d{8}")


class Images(Protocol):
    """Encoded images by index, read on access: for example a list of paths."""

    def __len__(self) -> int: ...

    @overload
    def __getitem__(self, index: int) -> ImageLike: ...

    @overload
    def __getitem__(self, index: slice) -> Images: ...


@runtime_checkable
class NamedImages(Images, Protocol):
    """Images whose names are known without reading them."""

    def name(self, index: int) -> str:
        """Return the name of an image for messages."""


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Encoded images with labels and random access."""

    images: Images
    """Paths, encoded bytes, uint8 arrays of shape (H, W) or (H, W, 3), or PIL images."""
    labels: Sequence[int]
    """Class of each image."""

    def __len__(self) -> int:
        return len(self.labels)

    def probe(self, count: int) -> Iterator[tuple[ImageLike, int]]:
        """Yield up to `count` evenly spaced images and their labels; skip unreadable ones."""
        for index in spread(range(len(self)), count):
            with contextlib.suppress(DataError):  # the loader counts and reports it
                yield self.images[index], self.labels[index]

    def name(self, index: int) -> str:
        """Return the image's path, or its number if it has none."""
        if isinstance(self.images, NamedImages):
            return self.images.name(index)
        image = self.images[index]
        return image if isinstance(image, str) else f"image {index}"


@dataclass(frozen=True, slots=True)
class ImageStream:
    """Labeled images that can only be read sequentially, in the order of the stream."""

    open: Callable[[bool, int, int], Any]
    """(training, batch size, seed) → timm's IterableImageDataset."""

    def __len__(self) -> int:
        return len(self.open(False, 1, 0))

    def probe(self, count: int) -> Iterator[tuple[ImageLike, int]]:
        """Yield the first `count` images and their labels."""
        yield from itertools.islice(self.open(False, 1, 0), count)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageData:
    """A dataset with a training part and a validation part."""

    name: str
    """Name of the dataset, for display."""
    classes: tuple[str, ...]
    """Names of the classes, in label order."""
    wnids: tuple[str, ...]
    """WordNet ids in label order, if the class folders have such names; otherwise empty."""
    train: ImageSet | ImageStream
    """Training images."""
    val: ImageSet | ImageStream
    """Validation images."""
    short_side: int
    """Median length of the shorter side, in pixels."""
    embedded: bool = False
    """Whether these are the digits of scikit-learn."""
    split: Split | None = None
    """The files of both parts, if no folder or tar file holds one part only."""


def embedded_digits() -> ImageData:
    """Return scikit-learn's digits: 1,797 scans of 8×8 pixels, a stratified fifth for validation.

    Source: Optical Recognition of Handwritten Digits (Alpaydin, Kaynak; UCI, 1998).
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    train, val = train_test_split(np.arange(len(pixels)), test_size=0.2, stratify=digits.target, random_state=0)

    def subset(indices: np.ndarray[Any, Any]) -> ImageSet:
        return ImageSet([pixels[i] for i in indices], [int(digits.target[i]) for i in indices])

    return ImageData(
        name="digits (scikit-learn)",
        classes=tuple(str(digit) for digit in range(10)),
        wnids=(),
        train=subset(train),
        val=subset(val),
        short_side=8,
        embedded=True,
    )


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the images of a dataset come from, for display and for messages."""

    name: str
    """Name of the dataset."""
    train: Path
    """Folder or list of the training images."""
    val: Path
    """Folder or list of the validation images."""

    @classmethod
    def of(cls, root: Path) -> Origin:
        """Return the origin of a dataset with the folders `root/train` and `root/val`."""
        return cls(root.resolve().name, root / "train", root / "val")


def by_class(
    origin: Origin,
    train: Mapping[str, Sequence[_Item]],
    val: Mapping[str, Sequence[_Item]],
    images: Callable[[Sequence[_Item]], Images],
    unread: Mapping[str, Counter[str]],
) -> ImageData:
    """Build a dataset from images that are grouped by class.

    A class without any image is reported and ignored.

    Args:
        origin: name of the dataset and its two parts.
        train: training items by class name.
        val: validation items by class name.
        images: converts a list of items to `Images`.
        unread: class without training images → number of its files by the suffix of an image format
            that is not decoded.

    Raises:
        DataError: there are fewer than two classes, `val` is empty, `val` has classes that are
            missing from `train`, or a class has only images of formats that are not decoded.
    """
    _check_empty_classes(origin, train, val, unread)
    names = sorted((name for name, items in train.items() if items), key=natural_key)
    if len(names) < 2:
        count = sum(len(items) for items in train.values())
        raise DataError(
            f"{origin.train}: found {count} images in {len(names)} class folders; expected at least two folders "
            f"of images ({', '.join(SUFFIXES)}), one per class"
        )
    filled = [name for name, items in val.items() if items]
    unknown = sorted(set(filled) - set(names))
    if unknown:
        raise DataError(
            f"{origin.val} has classes that are missing from train: {', '.join(unknown[:5])}; "
            "both need the same class folders"
        )
    if not filled:
        raise DataError(f"{origin.val}: found no images; expected val/CLASS/IMAGE files for validation")

    def image_set(items: Mapping[str, Sequence[_Item]]) -> ImageSet:
        pairs = [(item, label) for label, name in enumerate(names) for item in items.get(name, ())]
        return ImageSet(images([item for item, _ in pairs]), [label for _, label in pairs])

    wnids = tuple(names) if all(_WNID.fullmatch(name) for name in names) else ()
    trained = image_set(train)
    return ImageData(
        name=origin.name,
        classes=_imagenet_names(wnids) if wnids else tuple(names),
        wnids=wnids,
        train=trained,
        val=image_set(val),
        short_side=median_short_side(trained),
    )


def _check_empty_classes(
    origin: Origin,
    train: Mapping[str, Sequence[_Item]],
    val: Mapping[str, Sequence[_Item]],
    unread: Mapping[str, Counter[str]],
) -> None:
    """Report classes without images; raise DataError if their images are in unknown formats."""
    for name, counts in unread.items():
        formats = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()) if suffix)
        if formats:
            raise DataError(
                f"{origin.train}: the class {name} has no image that can be decoded; found {formats} files, expected "
                f"{', '.join(SUFFIXES)}",
                fix="convert these files, or remove the class from train and val",
            )
    empty = [name for name, items in train.items() if not items]
    if empty:
        log.warning("%s: ignored %d classes without images: %s", origin.train, len(empty), _listed(empty))
    unseen = [name for name, items in train.items() if items and not val.get(name)]
    if unseen and any(val.values()):
        log.warning("%s has no images of %d classes: %s", origin.val, len(unseen), _listed(unseen))


def _listed(names: Sequence[str], shown: int = 20) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _imagenet_names(wnids: Sequence[str]) -> tuple[str, ...]:
    info = ImageNetInfo("imagenet-22k")
    known = set(info.label_names())
    return tuple(info.label_name_to_description(wnid) if wnid in known else wnid for wnid in wnids)


def class_names(count: int) -> tuple[str, ...]:
    """Return class names if only their number is known; for 1000 classes, ImageNet's names."""
    if count == 1000:
        return tuple(ImageNetInfo().label_descriptions())
    return tuple(f"class {index}" for index in range(count))


def class_wnids(count: int) -> tuple[str, ...]:
    """Return ImageNet's WordNet ids for 1000 classes, and none for any other number."""
    return tuple(ImageNetInfo().label_names()) if count == 1000 else ()


def median_short_side(images: ImageSet | ImageStream, probes: int = 64) -> int:
    """Return the median shorter side of up to `probes` images; 0 if none can be read."""
    sides = []
    for image, _ in images.probe(probes):
        with contextlib.suppress(DataError):
            sides.append(min(image_size(image)))
    return int(np.median(sides)) if sides else 0


def choose_preprocessing(data: ImageData, config: DataConfig, model_config: dict[str, Any]) -> Preprocessing:
    """Choose input size and crop: the model's own, or a smaller size for smaller images.

    Args:
        data: the images.
        config: settings, whose input size takes precedence.
        model_config: result of `train.models.data_config`.

    Raises:
        ConfigError: the requested input size does not fit the architecture.
    """
    own = int(model_config["input_size"][-1])
    size = config.img_size
    if model_config.get("fixed_input_size"):
        if size not in (None, own):
            raise ConfigError(f"--img-size {size}: the architecture supports an input size of {own} px only")
        size = own
    if size is None:
        size = 32 if data.embedded else min(own, max(32, 32 * -(-data.short_side // 32)))
        if size != own:
            log.info(
                "input size: %d px, because the images have %d px (the model's own is %d)", size, data.short_side, own
            )
    return Preprocessing(
        height=size,
        width=size,
        mean=tuple(model_config["mean"]),
        std=tuple(model_config["std"]),
        interpolation=model_config["interpolation"],
        # If a small image is enlarged, cropping it would only lose information.
        crop_pct=1.0 if data.short_side <= size else float(model_config["crop_pct"]),
        crop_mode=model_config.get("crop_mode", "center"),
        exif=config.exif,
    )
