"""`evaluate`: models × cells → counts, in blocks of images that a kill does not undo.

Shape suffixes: N images, H height, W width, C channels, K classes.

Images are decoded once for all models and all corruptions. A block of images is always the same images, whatever the
shard and however often the run was stopped, so that its logits are the same to the last bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ConfigError, DataError, Interrupted, SpecError
from runtime.evaluate.blocks import Corruption, Workers, corrupt_block, in_order, load_block
from runtime.evaluate.cells import Cell, SuiteConfig
from runtime.evaluate.corruptions import corrupt
from runtime.evaluate.counts import Answers, Counts, answers_of, count
from runtime.evaluate.images import LabelledImages
from runtime.evaluate.journal import Journal
from runtime.evaluate.models import Model
from runtime.evaluate.provenance import alike, describe
from runtime.evaluate.results import Result, finished
from runtime.evaluate.suites import Suite, open_suite

__all__ = ["RunConfig", "evaluate"]

Progress = Callable[[int, int], None]
"""Called with the blocks that are done and all blocks."""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """How an evaluation is run. Only the batch size shows in its result."""

    out: Path
    """Folder of the journal, which is there until the evaluation is done."""
    batch_size: int = 8
    """Images a model sees at once. Twice as quick for each image as 32 on a CPU, whose caches hold so many."""
    workers: int = max(1, min(8, _cores() - 1))
    """Processes that decode and corrupt; 0: this one."""
    shard: int = 1
    """Which part of the blocks this run does, from 1,"""
    shards: int = 1
    """of how many."""
    cache: Path | None = None
    """Folder to keep corrupted images in; None keeps none."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0:
            raise ConfigError(f"batch_size must be at least 1 and workers at least 0; found {self}")
        if not 1 <= self.shard <= self.shards:
            raise ConfigError(f"a shard is i/n with 1 ≤ i ≤ n; found {self.shard}/{self.shards}")

    def blocks(self, images: LabelledImages) -> range:
        """The numbers of this shard's blocks."""
        return range(self.shard - 1, -(-len(images) // self.batch_size), self.shards)

    def within(self, block: int) -> slice:
        """The images of a block."""
        return slice(block * self.batch_size, (block + 1) * self.batch_size)


def evaluate(
    models: Sequence[Model],
    suite: SuiteConfig,
    run: RunConfig,
    *,
    reference: Model | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Measures models on a test set, going on where an earlier run of the same was stopped.

    Args:
        models: to be measured. They must have the same classes and input size, or those of each size and list of
            classes see images of their own.
        suite: the test set.
        run: how.
        reference: the model that the others' answers are compared with, image by image; it may be one of them.
        progress: told of every block.

    Returns:
        A result a model, in their order, as `runtime.evaluate.results` writes them.

    Raises:
        InputError: the set is not as it should be, an image cannot be decoded, or does not fit the model.
        BackendUnavailable: something that makes a corruption is missing.
        OutputError: the journal or the cache cannot be written.
        Interrupted: Ctrl-C; the same call goes on.
    """
    groups: list[list[Model]] = []
    for model in models:
        group = next((group for group in groups if alike(group[0].spec, model.spec)), None)
        groups.append([model]) if group is None else group.append(model)
    _check_reference(models, reference)
    plans = [_Plan(group, reference, open_suite(suite, group[0].spec), suite, run) for group in groups]
    total, before = sum(len(plan.units) for plan in plans), 0
    results: dict[int, Result] = {}
    for plan in plans:
        start = before

        def show(done: int, start: int = start) -> None:
            if progress is not None:
                progress(start + done, total)

        for model, result in zip(plan.models, plan.carry_out(show), strict=True):
            results[id(model)] = result
        before += len(plan.units)
    return [results[id(model)] for model in models]


def _check_reference(models: Sequence[Model], reference: Model | None) -> None:
    for model in models:
        if reference is not None and not alike(reference.spec, model.spec):
            raise ConfigError(
                f"{model.name} cannot be compared with the reference {reference.name} image by image: they have other "
                "classes or another input size. Evaluate it without --reference"
            )


class _Plan:
    """Models of one input size and list of classes, on one suite."""

    def __init__(
        self, models: list[Model], reference: Model | None, suite: Suite, config: SuiteConfig, run: RunConfig
    ) -> None:
        self.models = models
        self._reference = reference
        self._suite = suite
        self._run = run
        self.units = [(cell, block) for cell in suite.cells for block in run.blocks(cell.images)]
        if not self.units:
            most = max(-(-len(cell.images) // run.batch_size) for cell in suite.cells)
            raise ConfigError(
                f"shard {run.shard}/{run.shards} has no images: there are {most} blocks of {run.batch_size}. "
                "Use fewer shards or a smaller --batch-size"
            )
        shard = f"{run.shard}/{run.shards}"
        self._skeletons = [
            describe(model, None if model is reference else reference, suite, config, run.batch_size, shard)
            for model in models
        ]

    def carry_out(self, show: Callable[[int], None]) -> list[Result]:
        """Does what is not done yet, and returns a result a model."""
        with Journal(self._run.out, {"results": self._skeletons}) as journal:
            show(len(journal.done))
            pending = {(cell.id, block) for cell, block in self.units} - journal.done
            unfinished = {name for name, _ in pending}
            self._probe([cell for cell in self._suite.cells if cell.id in unfinished])
            try:
                with Workers(self._run.workers if pending else 0) as workers:
                    for cell, block, images_NHWC in self._images(workers, pending):
                        journal.add(cell.id, block, self._count(cell, block, images_NHWC))
                        show(len(journal.done))
            except KeyboardInterrupt:
                done = f"{len(journal.done)} of {len(self.units)} blocks are done"
                raise Interrupted(f"stopped: {done}; the same command goes on from there") from None
            results = [self._result(place, journal) for place in range(len(self.models))]
            journal.finish()
        return results

    def _result(self, place: int, journal: Journal) -> Result:
        skeleton = self._skeletons[place]
        compared = skeleton["reference"] is not None
        cells = {}
        for name, cell in skeleton["cells"].items():
            counts = journal.totals[name][place] if name in journal.totals else Counts.none(compared)
            cells[name] = {**cell, "counts": counts.to_dict()}
        return finished(skeleton | {"cells": cells})

    def _probe(self, cells: Sequence[Cell]) -> None:
        """What a corruption needs and is missing is found now, not hours later."""
        size = self.models[0].spec.preprocessing
        for name in {cell.corruption[0] for cell in cells if cell.corruption}:
            assert self._suite.table is not None
            corrupt(np.zeros((size.height, size.width, 3), np.uint8), name, 1, table=self._suite.table)

    def _images(self, workers: Workers, pending: set[tuple[str, int]]) -> Iterator[tuple[Cell, int, NDArray[np.uint8]]]:
        """Yields the images of every block that is not done: decoded once, then corrupted in all ways."""
        preprocessing = self.models[0].spec.preprocessing

        def load(base: _Base) -> Future[NDArray[np.uint8]]:
            cell = base.cells[0]
            return workers.submit(load_block, cell.images.source, base.names, preprocessing, cell.resize)

        def variants() -> Iterator[tuple[_Base, Cell, NDArray[np.uint8]]]:
            for base, images_NHWC in in_order(load, self._bases(pending), workers.ahead):
                self._check_size(images_NHWC, base)
                yield from ((base, cell, images_NHWC) for cell in base.cells)

        def make(variant: tuple[_Base, Cell, NDArray[np.uint8]]) -> Future[NDArray[np.uint8]]:
            base, cell, images_NHWC = variant
            if cell.corruption is None:
                return workers.ready(images_NHWC)
            assert self._suite.table is not None
            name, severity = cell.corruption
            how = Corruption(name=name, severity=severity, seed=self._suite.seed, table=self._suite.table)
            return workers.submit(corrupt_block, images_NHWC, base.names, how, self._run.cache)

        for (base, cell, _), images_NHWC in in_order(make, variants(), workers.ahead):
            yield cell, base.block, images_NHWC

    def _bases(self, pending: set[tuple[str, int]]) -> Iterator[_Base]:
        groups: dict[tuple[int, str], list[Cell]] = {}
        for cell in self._suite.cells:
            groups.setdefault((id(cell.images), cell.resize), []).append(cell)
        for cells in groups.values():
            images = cells[0].images
            for block in self._run.blocks(images):
                todo = [cell for cell in cells if (cell.id, block) in pending]
                if todo:
                    yield _Base(block, images.names[self._run.within(block)], todo)

    def _check_size(self, images_NHWC: NDArray[np.uint8], base: _Base) -> None:
        found, spec = images_NHWC.shape[1:3], self.models[0].spec.preprocessing
        fixed = next((model for model in (*self.models, self._reference) if model and not model.size_open), None)
        if fixed is not None and found != (spec.height, spec.width):
            raise DataError(
                f"{self._suite.name} is measured without resizing, and {base.names[0]} has {found[1]}×{found[0]} "
                f"pixels; {fixed.name} takes {spec.width}×{spec.height}. Export the model at the images' size "
                "(advprop-export --img-size); --resize fit resizes the images, and is another test"
            )

    def _count(self, cell: Cell, block: int, images_NHWC: NDArray[np.uint8]) -> list[Counts]:
        within = self._run.within(block)
        labels_N = np.asarray(cell.images.labels[within])
        positions_N = np.arange(within.start, within.start + len(labels_N))
        compared = None if self._reference is None else self._answers(self._reference, images_NHWC, labels_N)
        counts = []
        for model in self.models:
            if model is self._reference and compared is not None:
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
        return answers_of(logits_NK, labels_N, self._suite.classes)


@dataclass(frozen=True, slots=True)
class _Base:
    """A block of images before corruption, and the cells that need it."""

    block: int
    names: Sequence[str]
    cells: list[Cell]
