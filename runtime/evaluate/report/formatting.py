"""Format numbers and differences, in the same way for HTML and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from runtime.evaluate.report.numbers import Quantity, Unit, Value, Verdict, verdict_of
from runtime.evaluate.report.rows import Entry, Report, uncorrupted_cell
from runtime.evaluate.results import Result

__all__ = ["Finding", "Statement", "difference_of", "findings", "interval_text", "number", "points", "subject"]

_FACTORS = {Unit.SHARE: 100.0, Unit.MCE: 1.0, Unit.MILLISECONDS: 1.0, Unit.BYTES: 1e-6}
"""Factor from a number to its displayed value."""


class Statement(NamedTuple):
    """A statement about a difference, and its verdict."""

    text: str
    verdict: Verdict | None = None


class Finding(NamedTuple):
    """The differences between a model and its reference on a suite."""

    model: str
    compared_with: str
    statements: list[Statement]


def number(value: Value, unit: Unit) -> str:
    """Return a value with its unit, or – if it is missing."""
    if value.value is None:
        return "–"
    scaled = value.value * _FACTORS[unit]
    if unit is Unit.SHARE:
        return f"{scaled:.1f} %"
    return f"{scaled:.1f}" if unit is Unit.MCE else f"{scaled:.3g}"


def interval_text(interval: Sequence[float] | None, unit: Unit = Unit.SHARE, *, signed: bool = False) -> str:
    """Return an interval such as [1.0, 2.0], or "" without one. Shares are in percent."""
    if interval is None:
        return ""
    low, high = (end * _FACTORS[unit] for end in interval)
    if unit is Unit.SHARE and not signed:
        low, high = max(low, 0.0), min(high, 100.0)
    sign = "+" if signed else ""
    return f"[{low:{sign}.1f}, {high:{sign}.1f}]".replace("-", "−")


def points(difference: float, unit: Unit = Unit.SHARE) -> str:
    """Return a difference with its sign; differences of shares are in percentage points."""
    return f"{difference * _FACTORS[unit]:+.1f}".replace("-", "−")


def difference_of(value: Value, quantity: Quantity) -> Statement | None:
    """Return a value's difference from the reference; None if it has none."""
    if value.difference is None:
        return None
    interval = interval_text(value.difference_interval, quantity.unit, signed=True)
    verdict = verdict_of(value.difference_interval, quantity.higher_is_better)
    return Statement(f"{points(value.difference, quantity.unit)} {interval}".strip(), verdict)


def subject(report: Report) -> str:
    """Return a one-line summary of a report's content."""
    parts = []
    for suite in report.suites():
        counts = [
            max(cell["images"] for cell in result["cells"].values())
            for group in report.groups
            if group.suite == suite
            for _, result in group.results
        ]
        low, high = min(counts), max(counts)
        parts.append(f"{suite} ({low:,} images)" if low == high else f"{suite} ({low:,} to {high:,} images)")
    models = f"{len(report.entries)} model{'s' if len(report.entries) > 1 else ''}"
    return f"{models}, measured on {', '.join(parts)}."


def findings(report: Report) -> list[Finding]:
    """Return the differences between each model and its reference, on each suite."""
    found = []
    for group in report.groups:
        for entry, result in group.results:
            statements = _statements(entry, result) if result["reference"] else []
            if statements:
                compared_with = f"compared with {result['reference']['name']} on {group.suite}"
                found.append(Finding(entry.label, compared_with, statements))
    return found


def _statements(entry: Entry, result: Result) -> list[Statement]:
    statements = []
    cell = uncorrupted_cell(result)
    against = result["metrics"]["cells"][cell].get("against_reference") if cell else None
    if against:
        interval = against["top1_difference_interval"]
        text = f"top-1 {points(against['top1_difference'])} points {interval_text(interval, signed=True)}"
        statements.append(Statement(text, verdict_of(interval, higher_is_better=True)))
        statements.append(Statement(f"same class on {against['agreement']:.1%} of the images"))
    for key, name, unit, suffix in (
        ("mce_alexnet", "mCE (AlexNet = 100)", Unit.MCE, ""),
        ("mean_error", "mean error", Unit.SHARE, " points"),
    ):
        metric = result["metrics"].get(key, {})
        if metric.get("difference") is not None:
            interval = metric["difference_interval"]
            ends = interval_text(interval, unit, signed=True)
            text = f"{name} {points(metric['difference'], unit)}{suffix} {ends}".strip()
            statements.append(Statement(text, verdict_of(interval, higher_is_better=False)))
    return statements
