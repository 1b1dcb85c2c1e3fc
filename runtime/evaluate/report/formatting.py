"""Format numbers and differences, in the same way for HTML and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from runtime.evaluate.cells import CLEAN
from runtime.evaluate.intervals import detectable
from runtime.evaluate.report.numbers import Quantity, Unit, Value, Verdict, columns_of, verdict_of, weights_bytes
from runtime.evaluate.report.rows import CORRUPTED, Entry, Report, uncorrupted_cell
from runtime.evaluate.results import Result, dataset_name

__all__ = [
    "Conclusion",
    "Finding",
    "Statement",
    "conclusions",
    "datasets",
    "definitions",
    "difference_of",
    "findings",
    "interval_text",
    "number",
    "points",
    "subject",
    "title_of",
]

_TOO_WIDE = 5.0
"""Detectable difference, in percentage points, above which a test set has too few images."""

_FACTORS = {Unit.SHARE: 100.0, Unit.MCE: 1.0, Unit.MILLISECONDS: 1.0, Unit.BYTES: 1e-6}
"""Factor from a number to its displayed value."""


class Statement(NamedTuple):
    """A statement about a difference, and its verdict."""

    text: str
    verdict: Verdict | None = None


class Conclusion(NamedTuple):
    """The verdict on a model."""

    model: str
    statements: list[Statement]


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
    return f"{models}, measured on {', '.join(parts)} of {', '.join(datasets(report))}."


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


def title_of(report: Report) -> str:
    """Return the title of a report: its models and datasets."""
    labels = [entry.label for entry in report.entries]
    models = ", ".join(labels) if len(labels) <= 3 else f"{labels[0]} and {len(labels) - 1} other models"
    return f"{models} on {', '.join(datasets(report))}"


def datasets(report: Report) -> list[str]:
    """Return the names of the datasets, each once."""
    names = (dataset_name(result) for group in report.groups for _, result in group.results)
    return list(dict.fromkeys(name for name in names if name)) or report.suites()


def conclusions(report: Report) -> list[Conclusion]:
    """Return the verdict on each model that was compared with a reference."""
    found = []
    sizes = {value.place: weights_bytes(value) for value in report.entries}
    reference = next((entry for entry in report.entries if entry.is_reference), None)
    for entry in report.entries:
        parts: list[Statement] = []
        for suite in report.suites():
            result = entry.results.get(suite)
            if result is not None and result["reference"]:
                parts += _conclusions(result)
        size, other = sizes[entry.place], sizes[reference.place] if reference else None
        if parts and size and other and round(size / 1e5) != round(other / 1e5):
            parts.append(Statement(f"{size / 1e6:.1f} MB instead of {other / 1e6:.1f}"))
        if parts:
            found.append(Conclusion(entry.label, parts))
    return found


def _conclusions(result: Result) -> list[Statement]:
    """Return what was found on one suite: accuracy, and accuracy under corruptions."""
    found, cell, suite = [], uncorrupted_cell(result), result["suite"]
    against = result["metrics"]["cells"][cell].get("against_reference") if cell else None
    if against:
        images, interval = result["metrics"]["cells"][cell]["images"], against["top1_difference_interval"]
        where = "" if suite in (CLEAN, *CORRUPTED) else f"on {suite}, "
        if against["agreement"] == 1:
            found.append(Statement(f"{where}the same answers on all {images:,} images", Verdict.UNCLEAR))
        else:
            found.append(_conclusion(against["top1_difference"], interval, where, images))
    error = result["metrics"].get("mean_error", {})
    if error.get("difference") is not None:
        interval = error["difference_interval"]
        gain = None if interval is None else (-interval[1], -interval[0])
        images = min(item["images"] for item in result["cells"].values())
        found.append(_conclusion(-error["difference"], gain, "under corruptions, ", images))
    return found


def _conclusion(gain: float, interval: Sequence[float] | None, where: str, images: int) -> Statement:
    """Return the verdict on a gain (negative: a loss) of accuracy, from −1 to 1."""
    if interval is None:
        return Statement(f"{where}too few images ({images:,}) to tell about accuracy")
    verdict, size = verdict_of(interval, higher_is_better=True), 100 * detectable((interval[0], interval[1]))
    if verdict is Verdict.UNCLEAR:
        if size > _TOO_WIDE:
            text = f"{where}too few images to tell about accuracy: {images:,} only show a loss of {size:.1f} points"
        else:
            text = f"{where}no accuracy lost that {images:,} images can show (they show {size:.1f} points)"
        return Statement(text, verdict)
    change = "gained" if gain > 0 else "lost"
    low, high = sorted(abs(100 * end) for end in interval)
    text = f"{where}{100 * abs(gain):.1f} points of accuracy {change} (95% interval: {low:.1f} to {high:.1f})"
    return Statement(text, verdict)


def definitions(report: Report) -> list[str]:
    """Return an explanation of each metric that the table shows."""
    shown = {column.quantity for column in columns_of(report)}
    return [text for quantity, text in _DEFINITIONS.items() if quantity in shown]


_DEFINITIONS = {
    Quantity.MCE: (
        "mCE (mean corruption error): the errors under each of the fifteen corruptions, divided by AlexNet's errors, "
        "in percent. 100 is as robust as AlexNet; lower is better."
    ),
    Quantity.MCE_REFERENCE: (
        "mCE (mean corruption error) with reference = 100: the errors under each corruption, divided by the reference "
        "model's errors on the same images, in percent. Below 100 is more robust than the reference. It cannot be "
        "compared with mCE values of papers, which divide by AlexNet's errors on ImageNet."
    ),
    Quantity.MEAN_ERROR: "Mean error: the plain share of wrong answers over all corruptions and severities.",
    Quantity.MCE_ADAPTED: (
        "mCE, adapted: the same division, but of a model whose BatchNorm statistics were estimated on images of each "
        "corruption and severity, in the number that its name ends with. mCE forbids this, so the two cannot be "
        "compared."
    ),
    Quantity.MEAN_ERROR_ADAPTED: "Mean error, adapted: the mean error of such a model.",
    Quantity.AGREEMENT: "Agreement: the share of images that get the same class as from the reference, right or wrong.",
}
"""Quantity → what it means, for readers who do not know it."""


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
        ("mce_reference", "mCE (reference = 100)", Unit.MCE, ""),
        ("mean_error", "mean error", Unit.SHARE, " points"),
    ):
        metric = result["metrics"].get(key, {})
        on_imagenet = result["metrics"].get("mce_alexnet", {}).get("value") is not None
        if metric.get("difference") is not None and not (key == "mce_reference" and on_imagenet):
            interval = metric["difference_interval"]
            ends = interval_text(interval, unit, signed=True)
            text = f"{name} {points(metric['difference'], unit)}{suffix} {ends}".strip()
            statements.append(Statement(text, verdict_of(interval, higher_is_better=False)))
    return statements
