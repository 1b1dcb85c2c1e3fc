"""What is trained on: labeled images with their class names, not decoded yet.

embedded_digits   what comes with scikit-learn
image_folder      train/CLASS/*, val/CLASS/*
train.archives    the same, or WebDataset shards, in tar files
train.datasets    torchvision, Hugging Face and TFDS names, through timm
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload, runtime_checkable

import numpy as np
from timm.data import ImageNetInfo
from timm.utils.misc import natural_key

from runtime.errors import ConfigError, DataError
from runtime.preprocessing import ImageLike, image_size
from runtime.spec import Preprocessing
from runtime.system.image_sources import SUFFIXES, class_folders, find_images, spread
from train.config import DataConfig

__all__ = [
    "ImageData",
    "ImageSet",
    "ImageStream",
    "Images",
    "NamedImages",
    "by_class",
    "choose_preprocessing",
    "class_names",
    "class_wnids",
    "embedded_digits",
    "image_folder",
    "median_short_side",
]

log = logging.getLogger(__name__)

_Item = TypeVar("_Item")
_WNID = re.compile(r"n\d{8}")


class Images(Protocol):
    """Encoded images by index, read when asked for: a list of paths, say."""

    def __len__(self) -> int: ...

    @overload
    def __getitem__(self, index: int) -> ImageLike: ...

    @overload
    def __getitem__(self, index: slice) -> Images: ...


@runtime_checkable
class NamedImages(Images, Protocol):
    """Images that can be named without reading them."""

    def name(self, index: int) -> str:
        """What to call an image in a message."""


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Labeled images, not decoded yet."""

    images: Images
    """Paths, encoded bytes, uint8 arrays of shape (H, W) or (H, W, 3), or PIL images."""
    labels: Sequence[int]
    """Class of each image."""

    def __len__(self) -> int:
        return len(self.labels)

    def probe(self, count: int) -> Iterator[tuple[ImageLike, int]]:
        """Yields `count` images that can be read, spread evenly, with their labels."""
        for index in spread(range(len(self)), count):
            with contextlib.suppress(DataError):  # counted and named when it is decoded
                yield self.images[index], self.labels[index]

    def name(self, index: int) -> str:
        """The image's path, or its number where it has none."""
        if isinstance(self.images, NamedImages):
            return self.images.name(index)
        image = self.images[index]
        return image if isinstance(image, str) else f"image {index}"


@dataclass(frozen=True, slots=True)
class ImageStream:
    """Labeled images that come one after the other, in an order of their own."""

    open: Callable[[bool, int, int], Any]
    """(training, batch size, seed) → timm's IterableImageDataset."""

    def __len__(self) -> int:
        return len(self.open(False, 1, 0))

    def probe(self, count: int) -> Iterator[tuple[ImageLike, int]]:
        """Yields the first `count` images with their labels."""
        yield from itertools.islice(self.open(False, 1, 0), count)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageData:
    """A data set with its hold-out."""

    name: str
    """The data set in words, for people."""
    classes: tuple[str, ...]
    """Names of the classes, in label order."""
    wnids: tuple[str, ...]
    """WordNet ids where the folders are called so; else empty."""
    train: ImageSet | ImageStream
    """What is trained on."""
    val: ImageSet | ImageStream
    """What is measured on."""
    short_side: int
    """Median length of the shorter side, pixels."""
    embedded: bool = False
    """The digits that come with scikit-learn."""


def embedded_digits() -> ImageData:
    """scikit-learn's digits: 1,797 scans of 8×8 pixels, a stratified fifth held out.

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


def image_folder(root: Path) -> ImageData:
    """Reads the file names of `root/train/CLASS/*` and `root/val/CLASS/*`.

    Raises:
        DataError: a folder is missing or empty, there are fewer than two classes, or
            `val` has classes that `train` has not.
    """
    for part in ("train", "val"):
        if not (root / part).is_dir():
            there = sorted(entry.name for entry in root.iterdir())[:8] if root.is_dir() else None
            found = f"found {', '.join(there) or 'an empty folder'}" if there is not None else "no such folder"
            raise DataError(f"{root}: {found}; expected {part}/CLASS/IMAGE files below it ({root / part} is missing)")
    parts = {part: _labeled_files(root / part) for part in ("train", "val")}
    return by_class(root, parts["train"], parts["val"], list)


def by_class(
    root: Path,
    train: Mapping[str, Sequence[_Item]],
    val: Mapping[str, Sequence[_Item]],
    images: Callable[[Sequence[_Item]], Images],
) -> ImageData:
    """Makes a data set of images that are sorted by class.

    Args:
        root: where they are.
        train: what `images` takes, by class name.
        val: the same for the hold-out.
        images: makes such items readable.

    Raises:
        DataError: there are fewer than two classes, or `val` has none, or some that `train` has not.
    """
    names = sorted((name for name, items in train.items() if items), key=natural_key)
    if len(names) < 2:
        count = sum(len(items) for items in train.values())
        raise DataError(
            f"{root / 'train'}: found {count} images in {len(names)} class folders; expected at least two folders "
            f"of images ({', '.join(SUFFIXES)}), one a class"
        )
    filled = [name for name, items in val.items() if items]
    strangers = sorted(set(filled) - set(names))
    if strangers:
        raise DataError(
            f"{root / 'val'} has classes that train has not: {', '.join(strangers[:5])}; "
            "both need the same class folders"
        )
    if not filled:
        raise DataError(f"{root / 'val'}: found no images; expected val/CLASS/IMAGE files to measure on")

    def image_set(items: Mapping[str, Sequence[_Item]]) -> ImageSet:
        pairs = [(item, label) for label, name in enumerate(names) for item in items.get(name, ())]
        return ImageSet(images([item for item, _ in pairs]), [label for _, label in pairs])

    wnids = tuple(names) if all(_WNID.fullmatch(name) for name in names) else ()
    trained = image_set(train)
    return ImageData(
        name=root.resolve().name,
        classes=_imagenet_names(wnids) if wnids else tuple(names),
        wnids=wnids,
        train=trained,
        val=image_set(val),
        short_side=median_short_side(trained),
    )


def _labeled_files(folder: Path) -> dict[str, list[str]]:
    """Return the image files by class folder, in natural order, as timm sorts them."""
    found = find_images(folder, class_folders(folder))
    return {name: sorted((str(folder / file) for file in files), key=natural_key) for name, files in found.items()}


def _imagenet_names(wnids: Sequence[str]) -> tuple[str, ...]:
    info = ImageNetInfo("imagenet-22k")
    known = set(info.label_names())
    return tuple(info.label_name_to_description(wnid) if wnid in known else wnid for wnid in wnids)


def class_names(count: int) -> tuple[str, ...]:
    """Returns names for classes of which only the number is known; a thousand are ImageNet's."""
    if count == 1000:
        return tuple(ImageNetInfo().label_descriptions())
    return tuple(f"class {index}" for index in range(count))


def class_wnids(count: int) -> tuple[str, ...]:
    """Returns the WordNet ids of ImageNet's thousand classes; none for another number."""
    return tuple(ImageNetInfo().label_names()) if count == 1000 else ()


def median_short_side(images: ImageSet | ImageStream, probes: int = 64) -> int:
    """Looks at the headers of a few images; 0 where none can be read."""
    sides = []
    for image, _ in images.probe(probes):
        with contextlib.suppress(DataError):
            sides.append(min(image_size(image)))
    return int(np.median(sides)) if sides else 0


def choose_preprocessing(data: ImageData, config: DataConfig, model_config: dict[str, Any]) -> Preprocessing:
    """Picks the input size and crop: the model's own, less where the images are smaller.

    Args:
        data: the images.
        config: explicit wishes.
        model_config: what `timm.data.resolve_model_data_config` says, and timm's `fixed_input_size`.
    """
    own = int(model_config["input_size"][-1])
    size = config.img_size
    if model_config.get("fixed_input_size"):
        if size not in (None, own):
            raise ConfigError(f"--img-size {size}: the architecture takes {own} px only")
        size = own
    if size is None:
        size = 32 if data.embedded else min(own, max(32, 32 * -(-data.short_side // 32)))
        if size != own:
            log.info("input size %d px: the images are %d px (the model's own is %d)", size, data.short_side, own)
    return Preprocessing(
        height=size,
        width=size,
        mean=tuple(model_config["mean"]),
        std=tuple(model_config["std"]),
        interpolation=model_config["interpolation"],
        # Enlarging a small image only to cut its border off would lose information.
        crop_pct=1.0 if data.short_side <= size else float(model_config["crop_pct"]),
        crop_mode=model_config.get("crop_mode", "center"),
    )
