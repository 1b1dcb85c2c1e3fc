"""Numbers and differences in words, the same on the page and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.evaluate.report.numbers import Value, verdict
from runtime.evaluate.report.rows import Entry, Report, main_cell
from runtime.evaluate.results import Result

__all__ = ["Finding", "difference_of", "ends", "findings", "number", "points", "subject"]

Finding = tuple[str, str, list[tuple[str, str]]]
"""Of a model: its name, what it is compared on, and (statement, verdict) pairs."""

_FACTOR = {"share": 100.0, "mce": 1.0, "ms": 1.0, "bytes": 1e-6}


def number(value: Value) -> str:
    """A value with its unit, or – where there is none."""
    if value.value is None:
        return "–"
    scaled = value.value * _FACTOR[value.form]
    if value.form == "share":
        return f"{scaled:.1f} %"
    return f"{scaled:.1f}" if value.form == "mce" else f"{scaled:.3g}"


def ends(interval: Sequence[float] | None, form: str, sign: str = "") -> str:
    """An interval such as [1.0, 2.0]; "" without one. Of shares in percent, not beyond 0 and 100."""
    if interval is None:
        return ""
    low, high = (end * _FACTOR[form] for end in interval)
    if form == "share" and not sign:
        low, high = max(low, 0.0), min(high, 100.0)
    return f"[{low:{sign}.1f}, {high:{sign}.1f}]".replace("-", "−")


def points(difference: float, form: str = "share") -> str:
    """A difference with its sign: of shares in percentage points."""
    return f"{difference * _FACTOR[form]:+.1f}".replace("-", "−")


def difference_of(value: Value) -> tuple[str, str]:
    """A value's difference from the reference with its interval, and what that says; ("", "") without one."""
    if value.difference is None:
        return "", ""
    text = f"{points(value.difference, value.form)} {ends(value.difference_interval, value.form, '+')}".strip()
    return text, verdict(value.difference_interval, value.more_is_better)


def subject(report: Report) -> str:
    """What the report is of, in a line."""
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
    """Returns what each model changes against its reference, on each suite."""
    found = []
    for group in report.groups:
        for entry, result in group.results:
            statements = _statements(entry, result) if result["reference"] else []
            if statements:
                found.append((entry.label, f"against {result['reference']['name']} on {group.suite}", statements))
    return found


def _statements(entry: Entry, result: Result) -> list[tuple[str, str]]:
    statements = []
    cell = main_cell(result)
    against = result["metrics"]["cells"][cell].get("against_reference") if cell else None
    if against:
        interval = against["top1_difference_interval"]
        text = f"top-1 {points(against['top1_difference'])} points {ends(interval, 'share', '+')}"
        statements.append((text, verdict(interval, True)))
        statements.append((f"same class on {against['agreement']:.1%} of the images", ""))
    for key, name, form, unit in (
        ("mce_alexnet", "mCE (AlexNet = 100)", "mce", ""),
        ("mean_error", "mean error", "share", " points"),
    ):
        metric = result["metrics"].get(key, {})
        if metric.get("difference") is not None:
            interval = metric["difference_interval"]
            text = f"{name} {points(metric['difference'], form)}{unit} {ends(interval, form, '+')}".strip()
            statements.append((text, verdict(interval, False)))
    return statements
