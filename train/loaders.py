"""Loaders: batches of decoded and augmented images on the device.

Shape suffixes: N images, V views, C channels, H height, W width.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader

from runtime.errors import ConfigError, DataError, first_line
from runtime.spec import Preprocessing
from train.config import DataConfig
from train.data import ImageData, ImageSet, ImageStream
from train.distributed import rank, world_size
from train.samples import EpochBatches, SeededSamples, StreamedSamples, Transform, seeded, transformed

__all__ = ["Batches", "SetBatches", "StreamBatches", "close_all", "eval_loader", "eval_transform", "train_loader"]

log = logging.getLogger(__name__)

_MAX_BAD_SHARE = 0.01
_SMALL_IMAGE = 128
_FEW_IMAGES = 2000
"""Below this number of images, crops cover more of the image: a network sees too few of them to learn
from tiny parts."""


class Batches:
    """Iterates over (normalized float32 images, int64 labels) on the device.

    Images are (N, C, H, W) in channels-last memory format, or (N, V, C, H, W).
    """

    def __init__(self, loader: DataLoader[Any], spec: Preprocessing, device: torch.device) -> None:
        self._loader = loader
        self._mean = torch.tensor(spec.mean, device=device).view(1, -1, 1, 1)
        self._std = torch.tensor(spec.std, device=device).view(1, -1, 1, 1)
        self._device = device
        self._iterator: Any = None

    def __len__(self) -> int:
        return len(self._loader)

    def close(self) -> None:
        """Stop the loader processes.

        They ignore signals, and Python waits for them when it exits. The traceback of an error can
        keep the iterator alive until then, so its destructor is not enough.
        """
        if self._loader.num_workers and self._iterator is not None:
            self._iterator._shutdown_workers()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self._iterator = iter(self._loader)
        for pixels, labels in self._iterator:
            layout = torch.channels_last if pixels.ndim == 4 else torch.contiguous_format
            images = pixels.to(self._device, non_blocking=True, memory_format=layout).float()
            images = images.div_(255).sub_(self._mean).div_(self._std)
            yield images, labels.to(self._device, non_blocking=True)

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """Make the next iteration start at the given batch of the given epoch."""
        raise NotImplementedError("validation images have a fixed order")

    def names(self, batch: int) -> list[str]:
        """Return the files in batch number `batch` of the epoch."""
        raise NotImplementedError("validation images have a fixed order")


def close_all(*batches: Batches) -> None:
    """Stop the loader processes of all `batches`."""
    for each in batches:
        each.close()


class SetBatches(Batches):
    """Batches of images with random access."""

    def __init__(
        self, loader: DataLoader[Any], samples: SeededSamples, sampler: EpochBatches | None, what: str, *rest: Any
    ) -> None:
        super().__init__(loader, *rest)
        self._samples, self._sampler, self._what = samples, sampler, what
        self._reported: set[str] = set()

    def start_at(self, epoch: int, batch: int = 0) -> None:
        assert self._sampler is not None, "validation images have a fixed order"
        self._sampler.epoch, self._sampler.start = epoch, batch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number, batch in enumerate(super().__iter__()):
            if number % 50 == 0:
                self.check_bad()
            yield batch
        self.check_bad()

    def names(self, batch: int) -> list[str]:
        assert self._sampler is not None, "validation images have a fixed order"
        return [self._samples.name(index) for index in self._sampler.indices(batch)]

    def check_bad(self) -> None:
        """Warn about images that could not be decoded, once for each.

        Raises:
            DataError: more than 1% of the images cannot be decoded.
        """
        bad = self._samples.bad_images()
        new = [name for name in bad if name not in self._reported]
        for name in new:
            log.warning("skipped an image that cannot be decoded: %s", name)
        if new:
            log.warning("%d of %d %s images cannot be decoded so far", len(bad), len(self._samples), self._what)
        self._reported.update(new)
        if len(bad) > max(1, _MAX_BAD_SHARE * len(self._samples)):
            raise DataError(
                f"{len(bad)} of {len(self._samples)} {self._what} images cannot be decoded, more than 1%: "
                f"{', '.join(bad[:3])}, …; remove or replace them"
            )


class StreamBatches(Batches):
    """Batches of a stream. Resuming within an epoch reads the earlier images of the epoch again."""

    def __init__(self, loader: DataLoader[Any], samples: StreamedSamples, batches: int, *rest: Any) -> None:
        super().__init__(loader, *rest)
        self._samples, self._batches, self._start = samples, batches, 0

    def __len__(self) -> int:
        return self._batches - self._start

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return itertools.islice(super().__iter__(), self._start, self._batches)

    def start_at(self, epoch: int, batch: int = 0) -> None:
        self._samples.start(epoch)
        self._start = batch

    def names(self, batch: int) -> list[str]:
        return ["(images of a stream have no names)"]


def train_loader(
    data: ImageData,
    config: DataConfig,
    spec: Preprocessing,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    views: int = 1,
) -> Batches:
    """Return shuffled, augmented batches of the training images of this process.

    Args:
        data: the images.
        config: settings of augmentation and workers.
        spec: input size and normalization.
        batch_size: images per batch and process.
        seed: seed of order and augmentation.
        device: device for the batches.
        views: 1 yields (N, C, H, W); 2 yields (N, 2, C, H, W) with AutoAugment in the second view.

    Raises:
        DataError: there are fewer images than in one batch of all processes.
    """
    transforms = _train_transforms(data, config, spec, views)
    options = _loader_options(config, data, device)
    if isinstance(data.train, ImageStream):
        stream = data.train.open(True, batch_size, seed)
        stream.set_loader_cfg(num_workers=options["num_workers"])
        streamed = StreamedSamples(stream, transforms, seed, exif=spec.exif)
        # New workers in each epoch, because a worker learns the epoch only when it starts.
        loader = DataLoader(streamed, batch_size, drop_last=True, **options | {"persistent_workers": False})
        batches = len(stream) // (batch_size * world_size())
        if not batches:
            raise DataError(
                f"found {len(stream)} training images, fewer than one batch; use --batch-size {len(stream)} or less"
            )
        return StreamBatches(loader, streamed, batches, spec, device)
    samples = SeededSamples(data.train, transforms, seed, train=True, exif=spec.exif)
    if len(samples) < 2 * world_size():
        raise DataError(f"found {len(samples)} training images; BatchNorm needs at least two per process")
    sampler = EpochBatches(
        data.train.labels,
        batch_size,
        seed,
        balanced=config.balance == "sampler",
        rank=rank(),
        world=world_size(),
    )
    loader = DataLoader(samples, batch_sampler=sampler, **options)
    return SetBatches(loader, samples, sampler, "training", spec, device)


def eval_loader(
    data: ImageData,
    config: DataConfig,
    spec: Preprocessing,
    *,
    batch_size: int,
    device: torch.device,
    every: int = 1,
) -> Batches:
    """Return batches of the validation images of this process, in order, with timm's transform.

    Args:
        data: the images.
        config: settings; only the number of workers is used.
        spec: input size, crop and normalization.
        batch_size: images per batch and process.
        device: device for the batches.
        every: use only every n-th image.
    """
    options = _loader_options(config, data, device)
    if isinstance(data.val, ImageStream):
        streamed = StreamedSamples(data.val.open(False, batch_size, 0), [eval_transform(spec)], 0, every, spec.exif)
        return Batches(DataLoader(streamed, batch_size, **options), spec, device)
    mine = slice(rank() * every, None, world_size() * every)
    samples = SeededSamples(
        ImageSet(data.val.images[mine], data.val.labels[mine]), [eval_transform(spec)], 0, False, spec.exif
    )
    order = [(0, index) for index in range(len(samples))]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    loader = DataLoader(samples, batch_sampler=batches, **options)
    return SetBatches(loader, samples, None, "validation", spec, device)


def _train_transforms(data: ImageData, config: DataConfig, spec: Preprocessing, views: int) -> list[Transform]:
    """Return timm's training transform of each view; its output is a uint8 CHW tensor."""
    small = spec.height < _SMALL_IMAGE
    hflip = config.hflip if config.hflip is not None else (0.0 if data.embedded else 0.5)
    jitter = config.color_jitter if config.color_jitter is not None else (0.0 if small else 0.4)
    few = isinstance(data.train, ImageSet) and len(data.train) < _FEW_IMAGES
    usual = (0.8, 1.0) if data.embedded else (0.5, 1.0) if small else (0.35, 1.0) if few else (0.08, 1.0)
    scale = config.crop_scale or usual
    transforms: list[Transform] = []
    for policy in (config.auto_augment, "original")[:views]:
        try:
            transform = create_transform(
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
            with seeded(0):
                transformed(transform, Image.new("RGB", (64, 64)))
        except (AssertionError, ValueError, KeyError, TypeError, IndexError) as error:
            raise ConfigError(
                f"timm has no augmentation policy {policy!r}" + (f": {first_line(error)}" if str(error) else ""),
                fix="set data.auto_augment to original, rand-m9-mstd0.5, augmix-m5-w4-d2, … or remove it",
            ) from error
        transforms.append(transform)
    return transforms


def eval_transform(spec: Preprocessing) -> Transform:
    """Return timm's evaluation transform; its output is a uint8 CHW tensor."""
    transform: Transform = create_transform(
        (3, spec.height, spec.width),
        is_training=False,
        interpolation=spec.interpolation,
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
        mean=spec.mean,
        use_prefetcher=True,
    )
    return transform


def _ignore_stop_signals(_: int) -> None:
    """Ignore SIGINT and SIGTERM in a loader process.

    Ctrl-C and most schedulers signal all processes of a run, but the loaders have to live until the
    main process has saved.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _loader_options(config: DataConfig, data: ImageData, device: torch.device) -> dict[str, Any]:
    """Return DataLoader options; the digits need no workers, and training on a CPU needs few."""
    workers = config.workers
    if workers is None:
        cores = os.cpu_count() or 1
        workers = 0 if data.embedded else min(16, cores) if device.type == "cuda" else max(1, cores // 4)
    return {
        # A loader draws a seed for its workers in each epoch, which is not used: samples are seeded
        # individually. A separate generator keeps the draw from advancing that of the training.
        "generator": torch.Generator(),
        "worker_init_fn": _ignore_stop_signals,
        "num_workers": workers,
        "pin_memory": device.type == "cuda",
        "persistent_workers": workers > 0,
        "prefetch_factor": 4 if workers else None,
    }
