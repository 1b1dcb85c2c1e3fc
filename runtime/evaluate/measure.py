"""`Measurement`: images of a block → counts of every model on it.

Shape suffixes: N images, H height, W width, C channels.

Images are decoded once for all models and all corruptions. A block of images is always the same images, whoever counts
it and however often the run was stopped, so that its logits are the same to the last bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import DataError, SpecError
from runtime.evaluate.cells import Cell, SuiteConfig
from runtime.evaluate.counts import Answers, Counts, answers_of, count
from runtime.evaluate.image_workers import Corruption, Workers, corrupt_block, in_order, load_block
from runtime.evaluate.models import Model
from runtime.evaluate.progress_log import Unit
from runtime.evaluate.provenance import describe
from runtime.evaluate.suites import Suite

__all__ = ["Base", "Counted", "Measurement"]

Counted = tuple[Unit, list[Counts]]
"""A cell and block, and the counts of every model there."""


@dataclass(frozen=True, slots=True)
class Base:
    """A block of images before corruption, and the cells that need it."""

    block: int
    names: Sequence[str]
    cells: list[Cell]

    @property
    def units(self) -> list[Unit]:
        return [(cell.id, self.block) for cell in self.cells]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Models of one input size and list of classes, on one suite."""

    models: Sequence[Model]
    reference: Model | None
    """What the models' answers are compared with; it may be one of them."""
    suite: Suite
    config: SuiteConfig
    """What `suite` was opened for, as it was asked."""
    batch_size: int
    cache: Path | None = None
    """Folder to keep corrupted images in; None keeps none."""

    def describe(self, shard: str) -> list[dict[str, Any]]:
        """Returns each model's result without counts: everything that its counts follow from."""
        return [
            describe(
                model,
                None if model is self.reference else self.reference,
                self.suite,
                self.config,
                self.batch_size,
                shard,
            )
            for model in self.models
        ]

    def within(self, block: int) -> slice:
        """The images of a block."""
        return slice(block * self.batch_size, (block + 1) * self.batch_size)

    def counts(self, units: Iterable[Unit], workers: Workers) -> Iterator[Counted]:
        """Counts every unit, in an order of its own.

        Raises:
            DataError: an image cannot be decoded, or does not fit a model.
            SpecError: a model's outputs are not those of its spec.
            BackendUnavailable: a worker process died.
        """
        for cell, block, images_NHWC in self._images(workers, units):
            yield (cell.id, block), self._count(cell, block, images_NHWC)

    def probe(self, cells: Container[str]) -> None:
        """What a corruption needs and is missing is found now, not hours later. Raises BackendUnavailable."""
        self.suite.probe(cells, self.models[0].spec.preprocessing)

    def _images(self, workers: Workers, units: Iterable[Unit]) -> Iterator[tuple[Cell, int, NDArray[np.uint8]]]:
        """Yields the images of every unit: decoded once, then corrupted in all ways."""
        preprocessing = self.models[0].spec.preprocessing

        def load(base: Base) -> Future[NDArray[np.uint8]]:
            cell = base.cells[0]
            return workers.submit(load_block, cell.images.source, base.names, preprocessing, cell.resize)

        def variants() -> Iterator[tuple[Base, Cell, NDArray[np.uint8]]]:
            for base, images_NHWC in in_order(load, self.bases(units), workers.ahead):
                self._check_size(images_NHWC, base)
                yield from ((base, cell, images_NHWC) for cell in base.cells)

        def make(variant: tuple[Base, Cell, NDArray[np.uint8]]) -> Future[NDArray[np.uint8]]:
            base, cell, images_NHWC = variant
            if cell.corruption is None:
                return workers.ready(images_NHWC)
            assert self.suite.table is not None
            name, severity = cell.corruption
            how = Corruption(name=name, severity=severity, seed=self.suite.seed, table=self.suite.table)
            return workers.submit(corrupt_block, images_NHWC, base.names, how, self.cache)

        for (base, cell, _), images_NHWC in in_order(make, variants(), workers.ahead):
            yield cell, base.block, images_NHWC

    def bases(self, units: Iterable[Unit]) -> Iterator[Base]:
        """Groups units by the images that they need."""
        blocks: dict[str, set[int]] = defaultdict(set)
        for name, block in units:
            blocks[name].add(block)
        groups: dict[tuple[int, str], list[Cell]] = defaultdict(list)
        for cell in self.suite.cells:
            if cell.id in blocks:
                groups[id(cell.images), cell.resize].append(cell)
        for cells in groups.values():
            for block in sorted(set().union(*(blocks[cell.id] for cell in cells))):
                names = cells[0].images.names[self.within(block)]
                yield Base(block, names, [cell for cell in cells if block in blocks[cell.id]])

    def _check_size(self, images_NHWC: NDArray[np.uint8], base: Base) -> None:
        found, spec = images_NHWC.shape[1:3], self.models[0].spec.preprocessing
        fixed = next((model for model in (*self.models, self.reference) if model and not model.size_open), None)
        if fixed is not None and found != (spec.height, spec.width):
            raise DataError(
                f"{self.suite.name} is measured without resizing, and {base.names[0]} has {found[1]}×{found[0]} "
                f"pixels; {fixed.name} takes {spec.width}×{spec.height}. Export the model at the images' size "
                "(advprop-export --img-size); --resize fit resizes the images, and is another test"
            )

    def _count(self, cell: Cell, block: int, images_NHWC: NDArray[np.uint8]) -> list[Counts]:
        within = self.within(block)
        labels_N = np.asarray(cell.images.labels[within])
        positions_N = np.arange(within.start, within.start + len(labels_N))
        compared = None if self.reference is None else self._answers(self.reference, images_NHWC, labels_N)
        counts = []
        for model in self.models:
            if model is self.reference and compared is not None:
                counts.append(count(compared, positions_N))
            else:
                counts.append(count(self._answers(model, images_NHWC, labels_N), positions_N, compared))
        return counts

    def _answers(self, model: Model, images_NHWC: NDArray[np.uint8], labels_N: NDArray[Any]) -> Answers:
        logits_NK = model.logits(images_NHWC)
        if logits_NK.shape != (len(labels_N), len(model.spec.classes)):
            raise SpecError(
                f"{model.name} gave outputs of shape {logits_NK.shape} for {len(labels_N)} images; its spec names "
                f"{len(model.spec.classes)} classes"
            )
        return answers_of(logits_NK, labels_N, self.suite.classes)
