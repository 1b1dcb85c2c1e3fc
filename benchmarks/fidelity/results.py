"""Results of a study so far: means over seeds, paired differences and their intervals."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from benchmarks.fidelity.plan import MAIN_RECIPES, OTHER_RECIPES, TUNED, Cell, Plan, Settings, trials
from benchmarks.fidelity.study import FILES, HELD, PLAN, ROUTES, TRAINED, Study, StudyConfig, read
from runtime.errors import DataError
from train.recipes import MAIN

__all__ = ["METRICS", "Difference", "Results", "Run", "Verdict", "paired", "spread", "subtract"]

BySeed = Mapping[int, float]

METRICS: dict[str, Callable[[dict[str, Any]], float]] = {
    "clean accuracy": lambda route: 100 * route["top1"],
    "corruption error": lambda route: 100 * route["corruption_error"],
    "PGD ε = 1": lambda route: 100 * route["pgd"]["1"],
    "PGD ε = 4": lambda route: 100 * route["pgd"]["4"],
    "PGD ε = 8": lambda route: 100 * route["pgd"]["8"],
    "ECE": lambda route: 100 * route["calibration_error"],
}
"""Name → percentage of a measured route."""


class Verdict(StrEnum):
    """What a measured difference means for a statement."""

    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "not reproduced"
    UNDECIDED = "undecided"
    NOT_RUN = "not run yet"


class Difference(NamedTuple):
    """Mean difference over seeds, in percentage points."""

    mean: float
    half: float | None
    """Half width of the 95 % interval; None with one seed."""
    seeds: int

    def __str__(self) -> str:
        text = f"{self.mean:+.1f}".replace("-", "−")
        if self.half is None:
            return f"{text} (1 seed)"
        return f"{text} [{self.mean - self.half:+.1f}, {self.mean + self.half:+.1f}]".replace("-", "−")

    def verdict(self, sign: int) -> Verdict:
        """Return whether the interval lies on the side of `sign` (1 or −1), on the other, or on both."""
        if self.half is None or abs(self.mean) <= self.half:
            return Verdict.UNDECIDED
        return Verdict.REPRODUCED if self.mean * sign > 0 else Verdict.NOT_REPRODUCED


def subtract(values: BySeed, reference: BySeed) -> dict[int, float]:
    """Return the differences of the common seeds."""
    return {seed: values[seed] - reference[seed] for seed in sorted(set(values) & set(reference))}


def paired(values: BySeed, reference: BySeed) -> Difference | None:
    """Return the mean difference over common seeds with Student's t interval, or None without one."""
    found = list(subtract(values, reference).values())
    if not found:
        return None
    if len(found) == 1:
        return Difference(found[0], None, 1)
    error = statistics.stdev(found) / len(found) ** 0.5
    return Difference(statistics.mean(found), float(stats.t.ppf(0.975, len(found) - 1)) * error, len(found))


def spread(values: BySeed) -> str:
    """Return mean and standard deviation as text."""
    if not values:
        return "–"
    mean = statistics.mean(values.values())
    return f"{mean:.1f} ± {statistics.stdev(values.values()):.1f}" if len(values) > 1 else f"{mean:.1f}"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished training run and what is measured of it."""

    cell: Cell
    trained: dict[str, Any]
    routes: dict[str, Any] | None
    """Route → measurements, see `measure_checkpoint`."""
    files: dict[str, Any] | None
    """Precision → measurements, see `measure_files`."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that a study has measured so far."""

    description: dict[str, Any]
    """Plan, versions and machine, as the study wrote them."""
    plan: Plan
    tried: dict[str, list[dict[str, Any]]]
    """Recipe → its finished trials: `top1` on held-out images and `settings`."""
    chosen: dict[str, Settings] | None
    """Chosen settings; None until all trials are finished."""
    runs: list[Run]
    """Finished runs, in the order of the plan."""
    cpu_s: float
    """CPU time of all training runs, in seconds."""

    @classmethod
    def read(cls, out: Path) -> Results:
        """Read the results in the output folder of a study.

        Raises:
            DataError: there is no study.
        """
        description = read(out / PLAN)
        if description is None:
            raise DataError(f"{out} holds no study: expected the file {PLAN}")
        content = description["plan"]
        plan = Plan(**{**content, "sizes": tuple(tuple(size) for size in content["sizes"])})
        study = Study(StudyConfig(data=out, out=out, plan=plan))
        cells = {recipe: trials(plan, recipe) for recipe in TUNED}
        tried = {
            recipe: [found for cell in cells[recipe] if (found := read(study.folder(cell) / HELD))] for recipe in TUNED
        }
        complete = all(len(tried[recipe]) == len(cells[recipe]) for recipe in TUNED)
        chosen = study.chosen() if complete else None
        planned = [*plan.main_cells(chosen), *plan.other_cells(chosen)] if chosen else []
        runs, cpu_s = [], 0.0
        for cell in [*cells["vanilla"], *cells["advprop"], *planned]:
            folder = study.folder(cell)
            trained = read(folder / TRAINED)
            cpu_s += (trained or {}).get("cpu_s", 0.0)
            if trained and cell in planned:
                runs.append(Run(cell=cell, trained=trained, routes=read(folder / ROUTES), files=read(folder / FILES)))
        return cls(description=description, plan=plan, tried=tried, chosen=chosen, runs=runs, cpu_s=cpu_s)

    def of(self, recipe: str, images: int | None = None, arch: str | None = None) -> list[Run]:
        """Return the measured runs of a recipe, by default those of the main comparison."""
        images, arch = images or self.plan.images, arch or self.plan.arch
        return [
            run
            for run in self.runs
            if run.routes and (run.cell.recipe, run.cell.images, run.cell.arch) == (recipe, images, arch)
        ]

    def values(self, recipe: str, metric: str, route: str = MAIN, **where: Any) -> dict[int, float]:
        """Return seed → percentage of one of METRICS, of the runs whose route is measured."""
        found = {run.cell.seed: run.routes or {} for run in self.of(recipe, **where)}
        return {seed: METRICS[metric](routes[route]) for seed, routes in found.items() if route in routes}

    def file_values(self, recipe: str, precision: str, metric: str) -> dict[int, float]:
        """Return seed → percentage of an exported file."""
        return {
            run.cell.seed: METRICS[metric](run.files[precision]) for run in self.of(recipe) if run.files is not None
        }

    def recipes(self) -> list[str]:
        """Return the recipes with measured runs in the main comparison."""
        return [recipe for recipe in (*MAIN_RECIPES, *OTHER_RECIPES) if self.of(recipe)]

    def diverged(self) -> list[str]:
        """Return the recipes and seeds whose training diverged."""
        return [f"{run.cell.recipe} (seed {run.cell.seed})" for run in self.runs if run.trained["diverged"]]
