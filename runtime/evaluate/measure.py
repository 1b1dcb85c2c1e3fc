"""`Measurement`: run models on blocks of images and count their predictions.

Images are decoded once for all models and corruptions. A block always consists of the same images,
in every process and after every resumption, so its logits are bit-identical.

Shape suffixes: N images, H height, W width, C channels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import DataError, SpecError
from runtime.evaluate.cells import Cell, SuiteConfig
from runtime.evaluate.counts import Answers, Counts, answers_of, count
from runtime.evaluate.image_workers import Corruption, Workers, corrupt_block, in_order, load_block
from runtime.evaluate.models import Model
from runtime.evaluate.results import describe
from runtime.evaluate.suites import Suite
from runtime.spec import Preprocessing
from runtime.system.image_sources import spread

__all__ = ["Base", "Counted", "Measurement", "Unit"]

Unit = tuple[str, int]
"""A cell, and the number of a block of its images."""

Counted = tuple[Unit, list[Counts]]
"""A unit, and the counts of every model on it."""


@dataclass(frozen=True, slots=True)
class Base:
    """A block of images before corruption, and the cells that use it."""

    block: int
    names: Sequence[str]
    cells: list[Cell]

    @property
    def units(self) -> list[Unit]:
        """The units of this block."""
        return [(cell.id, self.block) for cell in self.cells]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Models with the same input size and classes, on one suite."""

    models: Sequence[Model]
    reference: Model | None
    """The model that the others are compared with; it may be one of them."""
    suite: Suite
    config: SuiteConfig
    """The settings that `suite` was opened with."""
    batch_size: int
    cache: Path | None = None
    """Folder for corrupted images; None disables the cache."""

    def describe(self, shard: str) -> list[dict[str, Any]]:
        """Return each model's result without counts: everything that its counts depend on."""
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
        """Return the positions of a block's images."""
        return slice(block * self.batch_size, (block + 1) * self.batch_size)

    def counts(self, units: Iterable[Unit], workers: Workers) -> Iterator[Counted]:
        """Yield the counts of every unit, grouped by the images that they share.

        Raises:
            DataError: an image cannot be decoded, or does not have a model's input size.
            SpecError: a model's outputs do not match its spec.
            BackendUnavailable: a worker process died.
        """
        if not any(model.field_images for model in self.models):
            for cell, block, images_NHWC in self._images(workers, units):
                yield (cell.id, block), self._count(self.models, cell, block, images_NHWC)
            return
        chosen = set(units)
        for cell in self.suite.cells:  # one after the other: each has adapted models of its own
            own = {unit for unit in chosen if unit[0] == cell.id}
            models = self._adapted(cell) if own else []
            for _, block, images_NHWC in self._images(workers, own):
                yield (cell.id, block), self._count(models, cell, block, images_NHWC)

    def probe(self, cells: Container[str]) -> None:
        """Call `Suite.probe` for the input size of the models.

        Raises:
            BackendUnavailable: a library or file that a corruption needs is missing.
        """
        self.suite.probe(cells, self.models[0].spec.preprocessing)

    def _images(self, workers: Workers, units: Iterable[Unit]) -> Iterator[tuple[Cell, int, NDArray[np.uint8]]]:
        """Yield the images of every unit. They are decoded once, then corrupted in all ways."""
        preprocessing = self.models[0].spec.preprocessing

        def load(base: Base) -> Future[NDArray[np.uint8]]:
            cell = base.cells[0]
            return workers.submit(
                load_block, cell.images.source, base.names, _read_as(preprocessing, cell), cell.resize
            )

        def variants() -> Iterator[tuple[Base, Cell, NDArray[np.uint8]]]:
            for base, images_NHWC in in_order(load, self.bases(units), workers.ahead):
                self._check_size(images_NHWC, base)
                yield from ((base, cell, images_NHWC) for cell in base.cells)

        def make(variant: tuple[Base, Cell, NDArray[np.uint8]]) -> Future[NDArray[np.uint8]]:
            base, cell, images_NHWC = variant
            corruption = self._corruption(cell)
            if corruption is None:
                return workers.completed(images_NHWC)
            return workers.submit(corrupt_block, images_NHWC, base.names, corruption, self.cache)

        for (base, cell, _), images_NHWC in in_order(make, variants(), workers.ahead):
            yield cell, base.block, images_NHWC

    def _adapted(self, cell: Cell) -> list[Model]:
        """Return the models, adapted to the field images of a cell."""
        assert cell.field is not None
        preprocessing = self.models[0].spec.preprocessing
        field_NHWC = load_block(cell.field.source, cell.field.names, _read_as(preprocessing, cell), cell.resize)
        corruption = self._corruption(cell)
        if corruption is not None:
            field_NHWC = corrupt_block(field_NHWC, cell.field.names, corruption, self.cache)
        models = []
        for model in self.models:
            if model.adapt is not None and model.field_images:
                logits, adapts = model.adapt(field_NHWC[spread(range(len(field_NHWC)), model.field_images)])
                models.append(replace(model, logits=logits, is_adapted=adapts))
            else:
                models.append(model)
        return models

    def _corruption(self, cell: Cell) -> Corruption | None:
        """Return the corruption that a cell computes, if any."""
        if cell.corruption is None:
            return None
        assert self.suite.table is not None
        name, severity = cell.corruption
        return Corruption(name=name, severity=severity, seed=self.suite.seed, table=self.suite.table)

    def bases(self, units: Iterable[Unit]) -> Iterator[Base]:
        """Yield units grouped by the images that they need."""
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
                f"{self.suite.name} is evaluated without resizing: {base.names[0]} has {found[1]}×{found[0]} pixels, "
                f"but {fixed.name} needs {spec.width}×{spec.height}. Export the model for the images' size "
                "(advprop-export --img-size), or resize them with --resize fit, which is a different test"
            )

    def _count(self, models: Sequence[Model], cell: Cell, block: int, images_NHWC: NDArray[np.uint8]) -> list[Counts]:
        within = self.within(block)
        labels_N = np.asarray(cell.images.labels[within])
        positions_N = np.arange(within.start, within.start + len(labels_N))
        compared = None if self.reference is None else self._answers(self.reference, images_NHWC, labels_N)
        counts = []
        for model in models:
            is_reference = model is self.reference and compared is not None
            answers = compared if is_reference else self._answers(model, images_NHWC, labels_N)
            assert answers is not None
            other = None if is_reference else compared
            found = count(answers, positions_N, other, calibration=cell.is_uncorrupted)
            counts.append(replace(found, adapted=found.images * model.is_adapted) if model.field_images else found)
        return counts

    def _answers(self, model: Model, images_NHWC: NDArray[np.uint8], labels_N: NDArray[Any]) -> Answers:
        logits_NK = model.logits(images_NHWC)
        if logits_NK.shape != (len(labels_N), len(model.spec.classes)):
            raise SpecError(
                f"{model.name} returned outputs of shape {logits_NK.shape} for {len(labels_N)} images; its spec names "
                f"{len(model.spec.classes)} classes"
            )
        return answers_of(logits_NK, labels_N, self.suite.classes)


def _read_as(preprocessing: Preprocessing, cell: Cell) -> Preprocessing:
    """Return how a cell's images are read: published sets as in their authors' code."""
    return replace(preprocessing, exif="ignore") if cell.published else preprocessing
