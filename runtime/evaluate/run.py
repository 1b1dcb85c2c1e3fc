"""Evaluate models on a test set, and resume an interrupted run."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import ConfigError, DataError, Interrupted
from runtime.evaluate.cells import SuiteConfig
from runtime.evaluate.counts import Counts
from runtime.evaluate.image_workers import Workers
from runtime.evaluate.images import LabeledImages
from runtime.evaluate.measure import Counted, Measurement, Unit
from runtime.evaluate.models import Model, same_inputs
from runtime.evaluate.progress_log import ProgressLog
from runtime.evaluate.results import Result, finished
from runtime.evaluate.suites import open_suite
from runtime.system.cpu import usable_cores

if TYPE_CHECKING:
    from runtime.evaluate.cluster import Cluster

__all__ = ["RunConfig", "evaluate"]

Progress = Callable[[int, int], None]
"""Called with the number of finished blocks and the number of all blocks."""

Counting = Callable[[Measurement, set[Unit]], Generator[Counted, None, None]]
"""Yields the counts of units, computed in this process, its workers or a cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Settings for running an evaluation. Only the batch size affects its result."""

    out: Path
    """Folder of the progress log, which is deleted when the evaluation is finished."""
    batch_size: int = 8
    """Images per call of a model. 8 images fit CPU caches, with twice the throughput of 32."""
    workers: int = max(1, min(8, usable_cores() - 1))
    """Processes that decode and corrupt images; 0 uses the calling process."""
    shard: int = 1
    """Number of the shard that this run computes, from 1."""
    shards: int = 1
    """Number of all shards."""
    cache: Path | None = None
    """Folder for corrupted images; None disables the cache."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0:
            raise ConfigError(f"batch_size must be at least 1 and workers at least 0; found {self}")
        if not 1 <= self.shard <= self.shards:
            raise ConfigError(f"a shard must be i/n with 1 ≤ i ≤ n; found {self.shard}/{self.shards}")

    def blocks(self, images: LabeledImages) -> range:
        """Return the numbers of this shard's blocks."""
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
    """Evaluate models on a test set. An interrupted run with the same arguments is resumed.

    Args:
        models: models to evaluate. Models with the same classes and input size share decoded
            images.
        suite: the test set.
        run: settings of the run.
        reference: model that the others are compared with, image by image; it may be one of them.
        progress: called after every block.
        cluster: Ray cluster that does the work and has loaded `models` and `reference` (default:
            this machine, with `run.workers` processes). The result is the same.

    Returns:
        One result per model, in the same order. `runtime.evaluate.results` writes them.

    Raises:
        InputError: the test set is invalid, or an image cannot be decoded or does not fit a model.
        BackendUnavailable: a library or file that a corruption needs is missing.
        OutputError: the progress log or the cache cannot be written.
        Interrupted: Ctrl-C was pressed; the same call resumes.
    """
    _check_reference(models, reference)
    counting = _count_locally(run.workers) if cluster is None else cluster.counts
    plans = []
    for group in _group_by_inputs(models):
        measurement = Measurement(
            models=group,
            reference=reference,
            suite=open_suite(suite if cluster is None else _with_absolute_paths(suite), group[0].spec),
            config=suite,
            batch_size=run.batch_size,
            cache=None if run.cache is None else run.cache.absolute(),
        )
        plans.append(_Plan(measurement, run))
    total, before = sum(len(plan.units) for plan in plans), 0
    results: dict[int, Result] = {}
    for plan in plans:

        def show(done: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        for model, result in zip(plan.measurement.models, plan.run(counting, show), strict=True):
            results[id(model)] = result
        before += len(plan.units)
    return [results[id(model)] for model in models]


def _group_by_inputs(models: Sequence[Model]) -> list[list[Model]]:
    """Group models that can share images."""
    groups: list[list[Model]] = []
    for model in models:
        group = next((group for group in groups if same_inputs(group[0].spec, model.spec)), None)
        groups.append([model]) if group is None else group.append(model)
    return groups


def _count_locally(workers: int) -> Counting:
    def counting(measurement: Measurement, units: set[Unit]) -> Generator[Counted, None, None]:
        measurement.probe({cell for cell, _ in units})
        with Workers(workers if units else 0) as processes:
            yield from measurement.counts(units, processes)

    return counting


def _with_absolute_paths(suite: SuiteConfig) -> SuiteConfig:
    """Return the settings with absolute paths, for processes with another working directory."""
    return replace(suite, data=suite.data.absolute(), clean=None if suite.clean is None else suite.clean.absolute())


def _check_reference(models: Sequence[Model], reference: Model | None) -> None:
    for model in models:
        if reference is not None and not same_inputs(reference.spec, model.spec):
            raise ConfigError(
                f"{model.name} cannot be compared with the reference {reference.name} image by image, because their "
                "classes or input sizes differ. Evaluate it without --reference"
            )


class _Plan:
    """The units of a measurement, their progress log, and the counts of finished units."""

    def __init__(self, measurement: Measurement, run: RunConfig) -> None:
        self.measurement = measurement
        self._run = run
        cells = measurement.suite.cells
        self._images = {cell.id: len(cell.images) for cell in cells}
        self.units = {(cell.id, block) for cell in cells for block in run.blocks(cell.images)}
        if not self.units:
            blocks = max(-(-len(cell.images) // run.batch_size) for cell in cells)
            raise ConfigError(
                f"shard {run.shard}/{run.shards} has no images: there are {blocks} blocks of {run.batch_size}. "
                "Use fewer shards or a smaller --batch-size"
            )
        self._descriptions = measurement.describe(f"{run.shard}/{run.shards}")
        self._done: set[Unit] = set()
        self._totals: dict[str, list[Counts]] = {}

    def run(self, counting: Counting, show: Callable[[int], None]) -> list[Result]:
        """Count the units that are not finished, and return one result per model."""
        plan, advice = {"results": self._descriptions}, ", or give each process its own --shard"
        with ProgressLog(self._run.out, plan, self._restore, advice=advice) as log:
            show(len(self._done))
            try:
                with closing(counting(self.measurement, self.units - self._done)) as counted:
                    for (cell, block), counts in counted:
                        log.append({"cell": cell, "block": block, "counts": [item.to_dict() for item in counts]})
                        show(len(self._done))
            except KeyboardInterrupt:
                done = f"{len(self._done)} of {len(self.units)} blocks are finished"
                raise Interrupted(f"stopped: {done}; run the same command to resume") from None
            results = [self._result(place) for place in range(len(self._descriptions))]
            log.remove()
        return results

    def _restore(self, entry: Any) -> None:
        """Add an entry of the progress log to the totals."""
        counts = [Counts.from_dict(item) for item in entry["counts"]]
        cell, block = str(entry["cell"]), int(entry["block"])
        if (cell, block) not in self.units:
            raise DataError(f"block {block} of {cell} is not part of this run")
        if (cell, block) in self._done:
            raise DataError(f"block {block} of {cell} is already counted")
        expected = [min(self._run.batch_size, self._images[cell] - block * self._run.batch_size)] * len(
            self._descriptions
        )
        if (found := [item.images for item in counts]) != expected:
            raise DataError(f"block {block} of {cell} must have the images {expected} of each model; found {found}")
        before = self._totals.get(cell)
        self._totals[cell] = [a + b for a, b in zip(before, counts, strict=True)] if before else counts
        self._done.add((cell, block))

    def _result(self, place: int) -> Result:
        description = self._descriptions[place]
        compared, adapts = description["reference"] is not None, "field_images" in description["model"]
        cells = {}
        for name, cell in description["cells"].items():
            found = self._totals.get(name)
            counts = found[place] if found else Counts.none(compared, "/" not in name, adapts)
            cells[name] = {**cell, "counts": counts.to_dict()}
        return finished(description | {"cells": cells})
