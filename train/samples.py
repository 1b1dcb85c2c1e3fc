"""Decode and augment samples, and determine the order of an epoch.

The augmentation of every sample is seeded by (seed, epoch, index), so the images of an epoch do not
depend on the number of workers or on where a run resumes. Samples of a stream have no index; they
are seeded by their position in the part of the stream that their worker reads.

Shape suffixes: V views, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from runtime.errors import ConfigError, DataError, first_line
from runtime.system.decode import decode
from train.balance import balanced_order
from train.data import ImageSet

__all__ = ["BAD_LABEL", "EpochBatches", "SeededSamples", "StreamedSamples", "Transform", "seeded", "transformed"]

Transform = Callable[[Image.Image], torch.Tensor]

_DRAWS = 10

BAD_LABEL = -1
"""Label of a validation image that cannot be decoded."""


class SeededSamples(Dataset[tuple[torch.Tensor, int]]):
    """Decoded, augmented samples. An index is (epoch, position)."""

    def __init__(
        self, images: ImageSet, transforms: Sequence[Transform], seed: int, train: bool, exif: str = "ignore"
    ) -> None:
        """
        Args:
            images: encoded images with labels.
            transforms: one per view; several views are stacked before the channels.
            seed: seed of the augmentation.
            exif: rule for the EXIF orientation, one of `runtime.spec.EXIF_RULES`.
            train: replace an image that cannot be decoded with the next one, so batches keep their
                size. Otherwise return a black image with the label BAD_LABEL.
        """
        self._images = images
        self._transforms = transforms
        self._seed = seed
        self._train = train
        self._exif = exif
        # 1 for each image that could not be decoded; worker processes share this memory.
        self.bad = torch.zeros(len(images.labels), dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = key
        image = self._decode(index)
        label = self._images.labels[index]
        if image is None and not self._train:
            image, label = Image.new("RGB", (8, 8)), BAD_LABEL
        while image is None:
            index = (index + 1) % len(self)
            image, label = self._decode(index), self._images.labels[index]
        with seeded(self._seed, epoch, index):
            return _views(self._transforms, image), label

    def _decode(self, index: int) -> Image.Image | None:
        try:
            return decode(self._images.images[index], exif=self._exif)
        except DataError:
            self.bad[index] = 1
            if int(self.bad.sum()) == len(self):
                raise
            return None

    def name(self, index: int) -> str:
        """Return the image's path, or its number if it has none."""
        return self._images.name(index)

    def bad_images(self) -> list[str]:
        """Return the names of the images that could not be decoded so far."""
        return [self.name(index) for index in torch.nonzero(self.bad).flatten().tolist()]


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the CPU generators of Python, NumPy and torch, and restore them after the context."""
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


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of one epoch in an order that depends on (seed, epoch) only.

    An incomplete last batch is dropped. With several processes, each takes every `world`-th image
    of a batch that is `world` times as large, so together they train on the batches of one process.
    """

    def __init__(
        self,
        labels: Sequence[int],
        batch_size: int,
        seed: int,
        *,
        balanced: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """
        Args:
            labels: label of each image.
            batch_size: images per batch and process.
            seed: seed of the order.
            balanced: draw all classes equally often; otherwise use every image once per epoch.
            rank: number of this process.
            world: number of processes.
        """
        self._count, self._batch_size, self._seed = len(labels), batch_size * world, seed
        self._labels = torch.tensor(labels) if balanced else None
        self._rank, self._world = rank, world
        self.epoch = 0
        self.start = 0
        """First batch to yield, for an epoch that resumes."""

    def __len__(self) -> int:
        return max(0, self._count // self._batch_size - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self._order()
        for batch in range(self.start, self._count // self._batch_size):
            yield [(self.epoch, index) for index in self._batch(order, batch)]

    def indices(self, batch: int) -> list[int]:
        """Return the indices of the images in one batch of the current epoch."""
        return self._batch(self._order(), batch)

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
        if self._labels is not None:
            order = balanced_order(self._labels, generator)
        else:
            order = torch.randperm(self._count, generator=generator)
        indices: list[int] = order.tolist()
        return indices

    def _batch(self, order: list[int], batch: int) -> list[int]:
        whole = order[batch * self._batch_size : (batch + 1) * self._batch_size]
        return whole[self._rank :: self._world]


class StreamedSamples(IterableDataset[tuple[torch.Tensor, int]]):
    """Augmented samples of a stream that timm reads. Each worker reads its own part."""

    def __init__(
        self, stream: Any, transforms: Sequence[Transform], seed: int, every: int = 1, exif: str = "ignore"
    ) -> None:
        """
        Args:
            stream: timm's IterableImageDataset.
            transforms: one per view; several views are stacked before the channels.
            seed: seed of the augmentation.
            every: use only every n-th image of the stream.
            exif: rule for the EXIF orientation, one of `runtime.spec.EXIF_RULES`.
        """
        self._stream = stream
        self._transforms = transforms
        self._seed = seed
        self._every = every
        self._exif = exif
        self._epoch = 0

    def start(self, epoch: int) -> None:
        """Select the epoch that workers started later will read."""
        self._epoch = epoch
        self._stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        worker = get_worker_info()
        part = 0 if worker is None else worker.id
        for number, (image, label) in enumerate(itertools.islice(self._stream, 0, None, self._every)):
            with seeded(self._seed, self._epoch, part, number):
                sample = _views(self._transforms, decode(image, exif=self._exif))
            yield sample, int(label)


def _views(transforms: Sequence[Transform], image: Image.Image) -> torch.Tensor:
    """Return the image's views as uint8: (C, H, W) for one view, (V, C, H, W) for several."""
    views = [transformed(transform, image) for transform in transforms]
    return views[0] if len(views) == 1 else torch.stack(views)


def transformed(transform: Transform, image: Image.Image) -> torch.Tensor:
    """Return the transformed image.

    timm's policies sometimes draw an operation that Pillow refuses, such as posterizing to 0 bits.
    The transform then draws again.

    Raises:
        ConfigError: all draws fail.
    """
    for _ in range(_DRAWS):
        try:
            return transform(image)
        except ValueError as error:
            refused = error
    raise ConfigError(f"the augmentation fails: {first_line(refused)}", fix="change data.auto_augment")
