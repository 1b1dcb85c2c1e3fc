"""Compute the numbers of a report: the headline table, and errors by corruption and severity."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from runtime.evaluate.cells import CLEAN
from runtime.evaluate.corruptions import CORRUPTIONS, EXTRAS
from runtime.evaluate.counts import Counts
from runtime.evaluate.intervals import Interval, wilson
from runtime.evaluate.metrics import difference_interval_of, error_of, interval_of, reference_of
from runtime.evaluate.report.rows import CORRUPTED, Entry, Report, uncorrupted_cell
from runtime.evaluate.results import Result

__all__ = [
    "Column",
    "CorruptionError",
    "Quantity",
    "Unit",
    "Value",
    "Verdict",
    "columns_of",
    "corruption_errors_of",
    "severity_errors",
    "verdict_of",
    "weights_bytes",
]


class Unit(Enum):
    """Unit of a number."""

    SHARE = "share"
    """From 0 to 1."""
    MCE = "mCE"
    """Percent of AlexNet's or the reference model's error."""
    MILLISECONDS = "ms"
    BYTES = "bytes"


class Quantity(Enum):
    """The quantity in a column of the headline table: title, unit, and whether higher is better."""

    TOP1 = ("top-1", Unit.SHARE, True)
    AGREEMENT = ("agreement", Unit.SHARE, True)
    MCE = ("mCE (AlexNet = 100)", Unit.MCE, False)
    MCE_REFERENCE = ("mCE (reference = 100)", Unit.MCE, False)
    MEAN_ERROR = ("mean error", Unit.SHARE, False)
    MCE_ADAPTED = ("mCE, adapted to each corruption", Unit.MCE, False)
    MEAN_ERROR_ADAPTED = ("mean error, adapted to each corruption", Unit.SHARE, False)
    LATENCY = ("p50 ms", Unit.MILLISECONDS, False)
    FILE_SIZE = ("size", Unit.BYTES, False)

    def __init__(self, title: str, unit: Unit, higher_is_better: bool) -> None:
        self.title = title
        self.unit = unit
        self.higher_is_better = higher_is_better


class Verdict(Enum):
    """Conclusion from the interval of a difference."""

    BETTER = "better"
    WORSE = "worse"
    UNCLEAR = "no difference shown"

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self is not Verdict.UNCLEAR


def verdict_of(interval: Sequence[float] | None, higher_is_better: bool) -> Verdict | None:
    """Return the verdict on the interval of a difference; None without an interval."""
    if interval is None:
        return None
    if interval[0] <= 0 <= interval[1]:
        return Verdict.UNCLEAR
    return Verdict.BETTER if (interval[0] > 0) == higher_is_better else Verdict.WORSE


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A number of the headline table."""

    value: float | None
    """The number; None if it is missing, for the reason in `why`."""
    interval: Sequence[float] | None = None
    difference: float | None = None
    """Difference from the reference."""
    difference_interval: Sequence[float] | None = None
    why: str = ""
    """Why the number is missing, or cannot be compared with the numbers of other models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the headline table, with one value per model."""

    quantity: Quantity
    measured_on: str
    """The suite or device."""
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CorruptionError:
    """A model's error under one corruption, from 0 to 1: the mean over its severities."""

    name: str
    error: float
    interval: Interval | None
    levels: tuple[tuple[int, float, Interval | None], ...]
    """Severity, error, interval."""
    difference: float | None = None
    """Difference from the reference."""
    difference_interval: Interval | None = None
    level_differences: Mapping[int, float] | None = None
    """Severity → difference from the reference."""


def corruption_errors_of(result: Result) -> list[CorruptionError]:
    """Return the errors by corruption, in the usual order of corruptions."""
    counts = {name: Counts.from_dict(cell["counts"]) for name, cell in result["cells"].items()}
    by_name: dict[str, dict[int, Counts]] = {}
    for name in counts:
        corruption, _, severity = name.partition("/")
        if severity:
            by_name.setdefault(corruption, {})[int(severity)] = counts[name]
    return [_corruption_error(name, by_name[name]) for name in (*CORRUPTIONS, *EXTRAS) if name in by_name]


def _corruption_error(name: str, levels: Mapping[int, Counts]) -> CorruptionError:
    cells = list(levels.values())
    found = CorruptionError(
        name=name,
        error=_mean(cells, None),
        interval=interval_of(cells, lambda groups: _mean(cells, groups)),
        levels=tuple((level, error_of(cell), _error_interval(cell)) for level, cell in levels.items()),
    )
    if any(cell.pairs is None for cell in cells):
        return found
    reference = [reference_of(cell) for cell in cells]
    return dataclasses.replace(
        found,
        difference=found.error - _mean(reference, None),
        difference_interval=difference_interval_of(
            cells, lambda groups: _mean(cells, groups) - _mean(reference, groups)
        ),
        level_differences={
            level: error_of(cell) - error_of(own) for (level, cell), own in zip(levels.items(), reference, strict=True)
        },
    )


def severity_errors(result: Result) -> list[tuple[int, float, Interval | None]]:
    """Return (severity, mean error, interval) over corruptions that have all severities."""
    counts = {name: Counts.from_dict(cell["counts"]) for name, cell in result["cells"].items() if "/" in name}
    names = [name for name in CORRUPTIONS if all(f"{name}/{level}" in counts for level in range(1, 6))]
    rows: list[tuple[int, float, Interval | None]] = []
    for level in range(1, 6) if names else ():
        cells = [counts[f"{name}/{level}"] for name in names]
        rows.append((level, _mean(cells, None), interval_of(cells, _mean_of(cells))))
    return rows


def _mean_of(cells: Sequence[Counts]) -> Callable[[Sequence[int]], float]:
    return lambda groups: _mean(cells, groups)


def _mean(cells: Sequence[Counts], groups: Sequence[int] | None) -> float:
    return sum(error_of(cell, groups) for cell in cells) / len(cells)


def _error_interval(counts: Counts) -> Interval | None:
    right = wilson(counts.top1, counts.images)
    return None if right is None else (1 - right[1], 1 - right[0])


def columns_of(report: Report) -> list[Column]:
    """Return the columns of the headline table that have a value for at least one model."""
    suites = report.suites()
    corrupted = [suite for suite in CORRUPTED if suite in suites]
    # A result never hides the columns of another one, so every suite keeps its own.
    ordered = [suite for suite in dict.fromkeys((*_PLAIN, *corrupted, *suites)) if _has_uncorrupted(report, suite)]
    columns = []
    for suite in ordered:
        if suite in (*_PLAIN, *corrupted):
            columns += [_top1(report, suite), _agreement(report, suite)]
    for suite in corrupted:
        columns += [_corruption_metric(report, suite, quantity) for quantity in _METRICS]
    columns += [_top1(report, suite) for suite in ordered if suite not in (*_PLAIN, *corrupted)]
    columns += _latencies(report)
    sizes = tuple(_file_size(entry) for entry in report.entries)
    columns.append(Column(quantity=Quantity.FILE_SIZE, measured_on="MB", values=sizes))
    return [column for column in columns if any(value.value is not None for value in column.values)]


def _has_uncorrupted(report: Report, suite: str) -> bool:
    return any(suite in entry.results and uncorrupted_cell(entry.results[suite]) for entry in report.entries)


def _uncorrupted_metrics(entry: Entry, suite: str) -> Mapping[str, Any] | None:
    result = entry.results.get(suite)
    cell = uncorrupted_cell(result) if result else None
    return result["metrics"]["cells"][cell] if result and cell else None


def _top1(report: Report, suite: str) -> Column:
    values = []
    for entry in report.entries:
        found = _uncorrupted_metrics(entry, suite)
        if found is None:
            values.append(Value(value=None, why=f"not measured on {suite}"))
            continue
        against = found.get("against_reference") or {}
        values.append(
            Value(
                value=found["top1"],
                interval=found["top1_interval"],
                difference=against.get("top1_difference"),
                difference_interval=against.get("top1_difference_interval"),
                why=report.why_separate(entry, suite),
            )
        )
    measured_on = f"{suite}, clean" if suite in CORRUPTED else suite
    return Column(quantity=Quantity.TOP1, measured_on=measured_on, values=tuple(values))


def _agreement(report: Report, suite: str) -> Column:
    values = []
    for entry in report.entries:
        against = (_uncorrupted_metrics(entry, suite) or {}).get("against_reference")
        if against is None:
            why = "this is the reference" if entry.is_reference else "not compared with a reference"
            values.append(Value(value=None, why=why))
        else:
            values.append(Value(value=against["agreement"], interval=against["agreement_interval"]))
    return Column(
        quantity=Quantity.AGREEMENT, measured_on=f"{suite}, same class as the reference", values=tuple(values)
    )


_PLAIN = (CLEAN, "imagenet", "cifar10")
"""Suites of uncorrupted images, in order of preference."""

_METRICS = {
    Quantity.MCE: "mce_alexnet",
    Quantity.MCE_REFERENCE: "mce_reference",
    Quantity.MEAN_ERROR: "mean_error",
    Quantity.MCE_ADAPTED: "mce_adapted",
    Quantity.MEAN_ERROR_ADAPTED: "mean_error_adapted",
}
"""Quantity → key in a result's metrics. Those of adapted models end with their number of images."""


def _corruption_metric(report: Report, suite: str, quantity: Quantity) -> Column:
    values = []
    adapted = quantity in (Quantity.MCE_ADAPTED, Quantity.MEAN_ERROR_ADAPTED)
    for entry in report.entries:
        key = f"{_METRICS[quantity]}_{entry.facts.get('field_images', 0)}" if adapted else _METRICS[quantity]
        result = entry.results.get(suite)
        found = result["metrics"].get(key, {}) if result else {}
        if quantity is Quantity.MCE_REFERENCE and result is not None:
            if result["metrics"].get("mce_alexnet", {}).get("value") is not None:
                found = {"why_not": "see mCE (AlexNet = 100)"}
            elif (
                entry.is_reference and not result["reference"] and result["metrics"].get("mean_error", {}).get("value")
            ):
                found = {"value": 100.0, "interval": None}
        if found.get("value") is None:
            values.append(Value(value=None, why=found.get("why_not", f"not measured on {suite}")))
            continue
        values.append(
            Value(
                value=found["value"],
                interval=found["interval"],
                difference=found.get("difference"),
                difference_interval=found.get("difference_interval"),
                why=report.why_separate(entry, suite),
            )
        )
    measured_on = f"{suite}, plain mean" if quantity is Quantity.MEAN_ERROR else suite
    return Column(quantity=quantity, measured_on=measured_on, values=tuple(values))


def _relative_mce(entry: Entry, result: Result) -> Mapping[str, Any]:
    """Return the mCE relative to the reference; the reference itself has 100 by definition."""
    metrics = result["metrics"]
    if metrics.get("mce_alexnet", {}).get("value") is not None:
        return {"why_not": "see mCE (AlexNet = 100)"}
    if entry.is_reference and not result["reference"] and metrics.get("mean_error", {}).get("value"):
        return {"value": 100.0, "interval": None}
    found: Mapping[str, Any] = metrics.get("mce_reference", {})
    return found


def _latencies(report: Report) -> list[Column]:
    columns = []
    for setting in dict.fromkeys(latency.setting for entry in report.entries for latency in entry.latencies):
        values = []
        for entry in report.entries:
            times = [latency.p50_ms for latency in entry.latencies if latency.setting == setting]
            values.append(Value(value=min(times, default=None), why="" if times else "not measured there"))
        columns.append(Column(quantity=Quantity.LATENCY, measured_on=setting, values=tuple(values)))
    return columns


def weights_bytes(entry: Entry) -> float | None:
    """Return the size of a model file, or of a checkpoint's weights without the optimizer's state."""
    is_checkpoint = entry.facts.get("kind") == "checkpoint"
    size = entry.facts.get("weights_bytes" if is_checkpoint else "size_bytes")
    return float(size) if isinstance(size, int | float) else None


def _file_size(entry: Entry) -> Value:
    size = weights_bytes(entry)
    return Value(value=size, why="" if size else "the result does not record it")
