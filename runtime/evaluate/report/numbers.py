"""The numbers of a report that results do not hold ready: by corruption, by severity, and the headline table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.evaluate.corruptions import CORRUPTIONS, EXTRAS
from runtime.evaluate.counts import Counts
from runtime.evaluate.intervals import Interval, wilson
from runtime.evaluate.metrics import error_of
from runtime.evaluate.report.rows import CORRUPTED, Entry, Report, main_cell
from runtime.evaluate.results import Result
from runtime.evaluate.summary import difference_interval_of, interval_of, reference_of

__all__ = ["Column", "CorruptionError", "Value", "columns_of", "corruption_errors_of", "severity_errors", "verdict"]

Cells = Mapping[str, Counts]


@dataclass(frozen=True, slots=True, kw_only=True)
class CorruptionError:
    """A model's error under one corruption, a share: the mean over its severities."""

    name: str
    error: float
    interval: Interval | None
    levels: tuple[tuple[int, float, Interval | None], ...]
    """Severity, error, interval."""
    difference: float | None = None
    """From the reference's."""
    difference_interval: Interval | None = None
    level_differences: Mapping[int, float] | None = None
    """By severity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A number of the headline table."""

    value: float | None
    """None: not there; `why` says more."""
    form: str
    """`share`, `mce`, `ms` or `bytes`."""
    interval: Sequence[float] | None = None
    difference: float | None = None
    difference_interval: Sequence[float] | None = None
    more_is_better: bool = False
    why: str = ""
    """Why there is none, or why it is not to be compared with those of the other rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the headline table: a value an entry."""

    title: str
    of: str
    """What it was measured on."""
    values: tuple[Value, ...]


def verdict(interval: Sequence[float] | None, more_is_better: bool) -> str:
    """What the interval of a difference says: `better`, `worse`, `no difference shown`, or "" without one."""
    if interval is None:
        return ""
    if interval[0] <= 0 <= interval[1]:
        return "no difference shown"
    return "better" if (interval[0] > 0) == more_is_better else "worse"


def corruption_errors_of(result: Result) -> list[CorruptionError]:
    """Returns the errors by corruption, in their usual order."""
    counts = {name: Counts.from_dict(cell["counts"]) for name, cell in result["cells"].items()}
    by_name: dict[str, dict[int, Counts]] = {}
    for name in counts:
        corruption, _, severity = name.partition("/")
        if severity:
            by_name.setdefault(corruption, {})[int(severity)] = counts[name]
    return [_corruption(name, by_name[name]) for name in (*CORRUPTIONS, *EXTRAS) if name in by_name]


def _corruption(name: str, levels: Mapping[int, Counts]) -> CorruptionError:
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
    return CorruptionError(
        name=name,
        error=found.error,
        interval=found.interval,
        levels=found.levels,
        difference=found.error - _mean(reference, None),
        difference_interval=difference_interval_of(
            cells, lambda groups: _mean(cells, groups) - _mean(reference, groups)
        ),
        level_differences={
            level: error_of(cell) - error_of(own) for (level, cell), own in zip(levels.items(), reference, strict=True)
        },
    )


def severity_errors(result: Result) -> list[tuple[int, float, Interval | None]]:
    """Returns severity, mean error and its interval, over those of the fifteen corruptions that have all severities."""
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
    """Returns the headline table's columns; those that no model has a value for are left out."""
    suites = report.suites()
    corrupted = [suite for suite in CORRUPTED if suite in suites]
    plain = next((suite for suite in ("imagenet", "cifar10", *corrupted) if _has_main(report, suite)), None)
    columns = [_top1(report, plain, "top-1"), _agreement(report, plain)] if plain else []
    for suite in corrupted:
        columns += [_over(report, suite, "mce_alexnet", "mCE"), _over(report, suite, "mean_error", "mean error")]
    columns += [_top1(report, suite, "top-1") for suite in suites if suite not in corrupted and suite != plain]
    columns += _latency(report)
    columns.append(Column(title="file", of="MB", values=tuple(_size(entry) for entry in report.entries)))
    return [column for column in columns if any(value.value is not None for value in column.values)]


def _has_main(report: Report, suite: str) -> bool:
    return any(suite in entry.results and main_cell(entry.results[suite]) for entry in report.entries)


def _main(entry: Entry, suite: str) -> Mapping[str, Any] | None:
    result = entry.results.get(suite)
    cell = main_cell(result) if result else None
    return result["metrics"]["cells"][cell] if result and cell else None


def _top1(report: Report, suite: str, title: str) -> Column:
    values = []
    for entry in report.entries:
        found = _main(entry, suite)
        if found is None:
            values.append(Value(value=None, form="share", why=f"not measured on {suite}"))
            continue
        against = found.get("against_reference") or {}
        values.append(
            Value(
                value=found["top1"],
                form="share",
                interval=found["top1_interval"],
                difference=against.get("top1_difference"),
                difference_interval=against.get("top1_difference_interval"),
                more_is_better=True,
                why=report.apart(entry, suite),
            )
        )
    of = f"{suite}, clean" if suite in CORRUPTED else suite
    return Column(title=title, of=of, values=tuple(values))


def _agreement(report: Report, suite: str) -> Column:
    values = []
    for entry in report.entries:
        against = (_main(entry, suite) or {}).get("against_reference")
        why = "the reference itself" if entry.is_reference else "not compared with a reference"
        if against is None:
            values.append(Value(value=None, form="share", why=why))
        else:
            interval = against["agreement_interval"]
            values.append(Value(value=against["agreement"], form="share", interval=interval, more_is_better=True))
    return Column(title="agreement", of="same class as the reference", values=tuple(values))


def _over(report: Report, suite: str, key: str, title: str) -> Column:
    values = []
    for entry in report.entries:
        result = entry.results.get(suite)
        found = result["metrics"].get(key, {}) if result else {}
        form = "mce" if key == "mce_alexnet" else "share"
        if found.get("value") is None:
            values.append(Value(value=None, form=form, why=found.get("why_not", f"not measured on {suite}")))
            continue
        values.append(
            Value(
                value=found["value"],
                form=form,
                interval=found["interval"],
                difference=found.get("difference"),
                difference_interval=found.get("difference_interval"),
                why=report.apart(entry, suite),
            )
        )
    of = f"{suite}, AlexNet = 100" if key == "mce_alexnet" else f"{suite}, plain mean"
    return Column(title=title, of=of, values=tuple(values))


def _latency(report: Report) -> list[Column]:
    places = dict.fromkeys(latency.place for entry in report.entries for latency in entry.latencies)
    columns = []
    for place in places:
        values = []
        for entry in report.entries:
            times = [latency.p50_ms for latency in entry.latencies if latency.place == place]
            values.append(Value(value=min(times, default=None), form="ms", why="" if times else "not timed there"))
        columns.append(Column(title="p50 ms", of=place, values=tuple(values)))
    return columns


def _size(entry: Entry) -> Value:
    size = entry.facts.get("size_bytes")
    if not isinstance(size, int | float):
        return Value(value=None, form="bytes", why="the result does not say")
    return Value(value=float(size), form="bytes")
