"""`evaluate`: models × cells → counts, in blocks of images that a kill does not undo."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import ConfigError, Interrupted
from runtime.evaluate.cells import SuiteConfig
from runtime.evaluate.counts import Counts
from runtime.evaluate.image_workers import Workers
from runtime.evaluate.images import LabeledImages
from runtime.evaluate.measure import Counted, Measurement
from runtime.evaluate.models import Model
from runtime.evaluate.progress_log import Journal, Unit
from runtime.evaluate.provenance import alike
from runtime.evaluate.results import Result, finished
from runtime.evaluate.suites import open_suite
from runtime.system.cpu import usable_cores

if TYPE_CHECKING:
    from runtime.evaluate.cluster import Cluster

__all__ = ["RunConfig", "evaluate"]

Progress = Callable[[int, int], None]
"""Called with the blocks that are done and all blocks."""

Counting = Callable[[Measurement, set[Unit]], Generator[Counted, None, None]]
"""What counts units, here or elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """How an evaluation is run. Only the batch size shows in its result."""

    out: Path
    """Folder of the journal, which is there until the evaluation is done."""
    batch_size: int = 8
    """Images a model sees at once. Twice as quick for each image as 32 on a CPU, whose caches hold so many."""
    workers: int = max(1, min(8, usable_cores() - 1))
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

    def blocks(self, images: LabeledImages) -> range:
        """The numbers of this shard's blocks."""
        return range(self.shard - 1, -(-len(images) // self.batch_size), self.shards)


def evaluate(
    models: Sequence[Model],
    suite: SuiteConfig,
    run: RunConfig,
    *,
    reference: Model | None = None,
    progress: Progress | None = None,
    cluster: Cluster | None = None,
) -> list[Result]:
    """Measures models on a test set, going on where an earlier run of the same was stopped.

    Args:
        models: to be measured. They must have the same classes and input size, or those of each size and list of
            classes see images of their own.
        suite: the test set.
        run: how.
        reference: the model that the others' answers are compared with, image by image; it may be one of them.
        progress: told of every block.
        cluster: the Ray cluster that does the work, and that `models` and `reference` were loaded by; None: this
            machine, in `run.workers` processes. The result is the same.

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
    counting = _here(run.workers) if cluster is None else cluster.counts
    plans = []
    for group in groups:
        opened = open_suite(suite if cluster is None else _absolute(suite), group[0].spec)
        measurement = Measurement(
            models=group,
            reference=reference,
            suite=opened,
            config=suite,
            batch_size=run.batch_size,
            cache=None if run.cache is None else run.cache.absolute(),
        )
        plans.append(_Plan(measurement, run))
    total, before = sum(len(plan.units) for plan in plans), 0
    results: dict[int, Result] = {}
    for plan in plans:
        start = before

        def show(done: int, start: int = start) -> None:
            if progress is not None:
                progress(start + done, total)

        for model, result in zip(plan.measurement.models, plan.carry_out(counting, show), strict=True):
            results[id(model)] = result
        before += len(plan.units)
    return [results[id(model)] for model in models]


def _here(workers: int) -> Counting:
    def counting(measurement: Measurement, units: set[Unit]) -> Generator[Counted, None, None]:
        measurement.probe({cell for cell, _ in units})
        with Workers(workers if units else 0) as processes:
            yield from measurement.counts(units, processes)

    return counting


def _absolute(suite: SuiteConfig) -> SuiteConfig:
    """The same for processes with another working directory."""
    return replace(suite, data=suite.data.absolute(), clean=None if suite.clean is None else suite.clean.absolute())


def _check_reference(models: Sequence[Model], reference: Model | None) -> None:
    for model in models:
        if reference is not None and not alike(reference.spec, model.spec):
            raise ConfigError(
                f"{model.name} cannot be compared with the reference {reference.name} image by image: they have other "
                "classes or another input size. Evaluate it without --reference"
            )


class _Plan:
    """Models of one input size and list of classes, on one suite."""

    def __init__(self, measurement: Measurement, run: RunConfig) -> None:
        self.measurement = measurement
        self._run = run
        cells = measurement.suite.cells
        self.units = {(cell.id, block) for cell in cells for block in run.blocks(cell.images)}
        if not self.units:
            most = max(-(-len(cell.images) // run.batch_size) for cell in cells)
            raise ConfigError(
                f"shard {run.shard}/{run.shards} has no images: there are {most} blocks of {run.batch_size}. "
                "Use fewer shards or a smaller --batch-size"
            )
        self._skeletons = measurement.describe(f"{run.shard}/{run.shards}")

    def carry_out(self, counting: Counting, show: Callable[[int], None]) -> list[Result]:
        """Does what is not done yet, and returns a result a model."""
        with Journal(self._run.out, {"results": self._skeletons}) as journal:
            show(len(journal.done))
            try:
                with closing(counting(self.measurement, self.units - journal.done)) as counted:
                    for (cell, block), counts in counted:
                        journal.add(cell, block, counts)
                        show(len(journal.done))
            except KeyboardInterrupt:
                done = f"{len(journal.done)} of {len(self.units)} blocks are done"
                raise Interrupted(f"stopped: {done}; the same command goes on from there") from None
            results = [self._result(place, journal) for place in range(len(self._skeletons))]
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
