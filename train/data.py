"""Images for training: the embedded digits or an ImageFolder, decoded, augmented, batched.

Every sample's augmentation is seeded by (seed, epoch, index), so the images of an epoch
do not depend on the number of workers nor on where a resumed run starts.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from timm.utils.misc import natural_key
from torch.utils.data import DataLoader, Dataset, Sampler

from runtime.errors import ConfigError, DataError
from runtime.images import SUFFIXES, decode
from runtime.spec import Preprocessing
from train.config import DataConfig

__all__ = ["ImageData", "ImageSet", "embedded_digits", "eval_loader", "image_folder", "train_loader"]

log = logging.getLogger(__name__)

BAD_LABEL = -1
"""Label of a validation image that could not be decoded."""
_MOST_BAD = 0.01
_SMALL = 128
_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Labelled images, not decoded yet."""

    images: Sequence[str | np.ndarray[Any, np.dtype[np.uint8]]]
    """Paths, or uint8 arrays of shape (H, W) or (H, W, 3)."""
    labels: Sequence[int]
    """Class of each image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageData:
    """A data set with its hold-out."""

    name: str
    """The data set in words, for people."""
    classes: tuple[str, ...]
    """Names of the classes, in label order."""
    wnids: tuple[str, ...]
    """WordNet ids where the folders are called so; else empty."""
    train: ImageSet
    """What is trained on."""
    val: ImageSet
    """What is measured on."""
    short_side: int
    """Median length of the shorter side, pixels."""
    embedded: bool
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
    train = _labelled_files(root / "train")
    names = sorted((name for name, files in train.items() if files), key=natural_key)
    if len(names) < 2:
        count = sum(len(files) for files in train.values())
        raise DataError(
            f"{root / 'train'}: found {count} images in {len(names)} class folders; expected at least two folders "
            f"of images ({', '.join(SUFFIXES)}), one a class"
        )
    val = {name: files for name, files in _labelled_files(root / "val").items() if files}
    strangers = sorted(set(val) - set(names))
    if strangers:
        raise DataError(
            f"{root / 'val'} has classes that train has not: {', '.join(strangers[:5])}; "
            "both need the same class folders"
        )
    if not val:
        raise DataError(f"{root / 'val'}: found no images; expected val/CLASS/IMAGE files to measure on")
    wnids = tuple(names) if all(_WNID.fullmatch(name) for name in names) else ()
    return ImageData(
        name=root.resolve().name,
        classes=_imagenet_names(wnids) if wnids else tuple(names),
        wnids=wnids,
        train=_image_set(train, names),
        val=_image_set(val, names),
        short_side=_median_short_side([path for files in train.values() for path in files]),
        embedded=False,
    )


def _labelled_files(folder: Path) -> dict[str, list[str]]:
    """Image files by the name of the class folder, whatever is below it; hidden folders are left out."""
    found: dict[str, list[str]] = {}
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.name.startswith("."):
            files = (
                str(Path(where, name))
                for where, _, names in os.walk(entry, followlinks=True)
                for name in names
                if name.lower().endswith(SUFFIXES)
            )
            found[entry.name] = sorted(files, key=natural_key)
    return found


def _image_set(files: dict[str, list[str]], classes: Sequence[str]) -> ImageSet:
    pairs = [(path, label) for label, name in enumerate(classes) for path in files.get(name, ())]
    return ImageSet([path for path, _ in pairs], [label for _, label in pairs])


_Item = TypeVar("_Item")


def spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """Returns `count` of the items (all, where there are fewer), spread evenly from first to last."""
    if len(items) <= count:
        return list(items)
    return [items[round(position)] for position in np.linspace(0, len(items) - 1, count)]


def _imagenet_names(wnids: Sequence[str]) -> tuple[str, ...]:
    info = ImageNetInfo("imagenet-22k")
    known = set(info.label_names())
    return tuple(info.label_name_to_description(wnid) if wnid in known else wnid for wnid in wnids)


def _median_short_side(paths: Sequence[str], probes: int = 64) -> int:
    """Looks at the headers of a few images spread over the set."""
    sides = []
    for path in paths[:: max(1, len(paths) // probes)]:
        try:
            with Image.open(path) as image:
                sides.append(min(image.size))
        except (OSError, SyntaxError):
            continue  # counted and named when it is decoded
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


class _SeededSamples(Dataset[tuple[torch.Tensor, int]]):
    """Decoded, augmented samples. An index is (epoch, position)."""

    def __init__(
        self, images: ImageSet, transforms: Sequence[Callable[[Image.Image], torch.Tensor]], seed: int, train: bool
    ) -> None:
        """Each of `transforms` makes a view; several views are stacked in front of the channels."""
        self._images = images
        self._transforms = transforms
        self._seed = seed
        self._train = train
        # One byte an image, shared with the worker processes: 1 where decoding failed.
        self.bad = torch.zeros(len(images.labels), dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self._images.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = key
        image = self._decode(index)
        label = self._images.labels[index]
        if image is None and not self._train:
            image, label = Image.new("RGB", (8, 8)), BAD_LABEL
        while image is None:
            # The next image of the set stands in, so that batches keep their size.
            index = (index + 1) % len(self)
            image, label = self._decode(index), self._images.labels[index]
        with _seeded(self._seed, epoch, index):
            views = [transform(image) for transform in self._transforms]
        return (views[0] if len(views) == 1 else torch.stack(views)), label

    def _decode(self, index: int) -> Image.Image | None:
        try:
            return decode(self._images.images[index])
        except DataError:
            self.bad[index] = 1
            if int(self.bad.sum()) == len(self):
                raise
            return None

    def name(self, index: int) -> str:
        """The image's path, or its number where it has none."""
        image = self._images.images[index]
        return image if isinstance(image, str) else f"image {index}"

    def bad_images(self) -> list[str]:
        """Names of the images that could not be decoded so far."""
        return [self.name(index) for index in torch.nonzero(self.bad).flatten().tolist()]


@contextmanager
def _seeded(*key: int) -> Iterator[None]:
    """Seeds Python's, NumPy's and torch's generators and puts them back afterwards."""
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class _EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of one epoch in an order that (seed, epoch) fixes. Incomplete ones are dropped.

    With several processes each takes every `world`-th image of a batch `world` times as
    large, so that together they see the batches that one process would.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self._count, self._batch_size, self._seed = count, batch_size * world, seed
        self._rank, self._world = rank, world
        self.epoch = 0
        self.start = 0
        """First batch to yield: where a resumed epoch goes on."""

    def __len__(self) -> int:
        return self._count // self._batch_size - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self._order()
        for batch in range(self.start, self._count // self._batch_size):
            yield [(self.epoch, index) for index in self._batch(order, batch)]

    def indices(self, batch: int) -> list[int]:
        """The images of one batch of the present epoch."""
        return self._batch(self._order(), batch)

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
        order: list[int] = torch.randperm(self._count, generator=generator).tolist()
        return order

    def _batch(self, order: list[int], batch: int) -> list[int]:
        whole = order[batch * self._batch_size : (batch + 1) * self._batch_size]
        return whole[self._rank :: self._world]


class Batches:
    """Iterates over (normalised float32 NCHW images, int64 labels) on the device."""

    def __init__(
        self,
        loader: DataLoader[Any],
        samples: _SeededSamples,
        sampler: _EpochBatches | None,
        spec: Preprocessing,
        device: torch.device,
        channels_last: bool,
        what: str,
    ) -> None:
        self._loader, self._samples, self._sampler = loader, samples, sampler
        self._mean = torch.tensor(spec.mean, device=device).view(1, -1, 1, 1)
        self._std = torch.tensor(spec.std, device=device).view(1, -1, 1, 1)
        self._device = device
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._what = what
        self._named: set[str] = set()

    def __len__(self) -> int:
        return len(self._loader)

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """Makes the next iteration that of `epoch`, from its batch number `batch` on."""
        assert self._sampler is not None, "evaluation has one order"
        self._sampler.epoch, self._sampler.start = epoch, batch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number, (pixels, labels) in enumerate(self._loader):
            if number % 50 == 0:
                self.check_bad()
            kind = self._format if pixels.ndim == 4 else torch.contiguous_format
            images = pixels.to(self._device, non_blocking=True, memory_format=kind).float()
            images = images.div_(255).sub_(self._mean).div_(self._std)
            yield images, labels.to(self._device, non_blocking=True)
        self.check_bad()

    def names(self, batch: int) -> list[str]:
        """The files of batch number `batch` of the epoch, before augmentation."""
        assert self._sampler is not None, "evaluation has one order"
        return [self._samples.name(index) for index in self._sampler.indices(batch)]

    def check_bad(self) -> None:
        """Names images that could not be decoded, once each.

        Raises:
            DataError: they are more than one in a hundred.
        """
        bad = self._samples.bad_images()
        new = [name for name in bad if name not in self._named]
        for name in new:
            log.warning("skipped an image that cannot be decoded: %s", name)
        if new:
            log.warning("%d of %d %s images cannot be decoded so far", len(bad), len(self._samples), self._what)
        self._named.update(new)
        if len(bad) > max(1, _MOST_BAD * len(self._samples)):
            raise DataError(
                f"{len(bad)} of {len(self._samples)} {self._what} images cannot be decoded, more than 1 %: "
                f"{', '.join(bad[:3])}, …; remove or replace them"
            )


def train_loader(
    data: ImageData,
    config: DataConfig,
    spec: Preprocessing,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    channels_last: bool,
    views: int = 1,
    rank: int = 0,
    world: int = 1,
) -> Batches:
    """Shuffled, augmented batches of the training images, (N, C, H, W); with two views, of
    which the second has AutoAugment, (N, 2, C, H, W)."""
    small = spec.height < _SMALL
    hflip = config.hflip if config.hflip is not None else (0.0 if data.embedded else 0.5)
    jitter = config.color_jitter if config.color_jitter is not None else (0.0 if small else 0.4)
    scale = config.crop_scale or ((0.8, 1.0) if data.embedded else (0.5, 1.0) if small else (0.08, 1.0))
    transforms = [
        create_transform(
            (3, spec.height, spec.width),
            is_training=True,
            scale=scale,
            ratio=(0.9, 1.1) if data.embedded else (3 / 4, 4 / 3),
            hflip=hflip,
            color_jitter=jitter or None,
            auto_augment=policy or None,
            interpolation=spec.interpolation,
            mean=spec.mean,
            use_prefetcher=True,
        )
        for policy in (config.auto_augment, "original")[:views]
    ]
    samples = _SeededSamples(data.train, transforms, seed, train=True)
    if len(samples) < batch_size * world:
        raise DataError(
            f"found {len(samples)} training images, fewer than one batch; use --batch-size {len(samples)} or less"
        )
    sampler = _EpochBatches(len(samples), batch_size, seed, rank, world)
    loader = DataLoader(samples, batch_sampler=sampler, **_workers(config, data, device))
    return Batches(loader, samples, sampler, spec, device, channels_last, "training")


def eval_loader(
    data: ImageData,
    config: DataConfig,
    spec: Preprocessing,
    *,
    batch_size: int,
    device: torch.device,
    channels_last: bool,
    every: int = 1,
    rank: int = 0,
    world: int = 1,
) -> Batches:
    """Batches of every `every`-th validation image, in order, by timm's evaluation transform;
    of those, this process's share."""
    mine = slice(rank * every, None, world * every)
    chosen = ImageSet(data.val.images[mine], data.val.labels[mine])
    samples = _SeededSamples(chosen, [eval_transform(spec)], 0, train=False)
    order = [(0, index) for index in range(len(samples))]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    loader = DataLoader(samples, batch_sampler=batches, **_workers(config, data, device))
    return Batches(loader, samples, None, spec, device, channels_last, "validation")


def eval_transform(spec: Preprocessing) -> Callable[[Image.Image], torch.Tensor]:
    """timm's evaluation transform up to the uint8 CHW tensor."""
    transform: Callable[[Image.Image], torch.Tensor] = create_transform(
        (3, spec.height, spec.width),
        is_training=False,
        interpolation=spec.interpolation,
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
        mean=spec.mean,
        use_prefetcher=True,
    )
    return transform


def _leave_signals_to_the_main_process(_: int) -> None:
    """Ctrl-C and most schedulers signal all processes of a run; loaders must live until it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _workers(config: DataConfig, data: ImageData, device: torch.device) -> dict[str, Any]:
    """Loader options: the digits need no process of their own, CPU training little help."""
    workers = config.workers
    if workers is None:
        cores = os.cpu_count() or 1
        workers = 0 if data.embedded else min(16, cores) if device.type == "cuda" else max(1, cores // 4)
    return {
        # A loader draws a seed for its workers at every start. Ours seed each sample, so let
        # that draw not disturb the training's generator.
        "generator": torch.Generator(),
        "worker_init_fn": _leave_signals_to_the_main_process,
        "num_workers": workers,
        "pin_memory": device.type == "cuda",
        "persistent_workers": workers > 0,
        "prefetch_factor": 4 if workers else None,
    }
