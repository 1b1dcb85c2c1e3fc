"""Write the report as Markdown, for a pull request or a wiki, and the raw cells as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from runtime.evaluate.report.formatting import (
    conclusions,
    definitions,
    difference_of,
    findings,
    interval_text,
    number,
    points,
    subject,
    title_of,
)
from runtime.evaluate.report.markup import clean
from runtime.evaluate.report.numbers import Column, Value, columns_of, corruption_errors_of
from runtime.evaluate.report.rows import CORRUPTED, Entry, Group, Report
from runtime.evaluate.results import Result, dataset_name

__all__ = ["CSV_COLUMNS", "escape", "to_csv", "to_markdown"]

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!&])")

CSV_COLUMNS = (
    *("model", "precision", "sha256", "suite", "cell", "corruption", "severity", "resize", "images", "names_sha256"),
    *("top1", "top5", "not_finite", "error", "error_low", "error_high", "calibration_error", "rms_calibration_error"),
    *("reference", "agree", "agreement", "top1_difference", "top1_difference_low", "top1_difference_high"),
)

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def to_markdown(report: Report, title: str = "", date: str = "") -> str:
    """Return the numbers of the page without its figures.

    Args:
        report: the content.
        title: title of the report (default: the models and datasets).
        date: date below the title (default: none).
    """
    lead = f"Accuracy and robustness{f', {date}' if date else ''}. {subject(report)}"
    parts = [f"# {escape(title or title_of(report))}", escape(lead), _verdict(report), _headline(report)]
    parts.append(_findings(report))
    parts += [_corruptions(group) for group in report.groups if group.suite in CORRUPTED]
    parts.append(_attacks(report))
    if report.gaps:
        parts.append("## Missing or not compared\n\n" + "\n".join(f"- {escape(gap)}" for gap in report.gaps))
    parts.append(_provenance(report))
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: object) -> str:
    """Escape text for Markdown: one line without HTML, links and table borders."""
    return _SPECIAL.sub(r"\\\1", clean(text))


def _verdict(report: Report) -> str:
    return "\n".join(
        f"- **{escape(conclusion.model)}**: {'; '.join(escape(text) for text, _ in conclusion.statements)}."
        for conclusion in conclusions(report)
    )


def _findings(report: Report) -> str:
    lines = []
    for finding in findings(report):
        statements = "; ".join(
            escape(text) + (f" – **{verdict.value}**" if verdict else "") for text, verdict in finding.statements
        )
        lines.append(f"- **{escape(finding.model)}** {escape(finding.compared_with)}: {statements}.")
    return "\n".join(lines)


def _headline(report: Report) -> str:
    columns = columns_of(report)
    heads = ["model", "precision", *(f"{column.quantity.title} ({column.measured_on})" for column in columns)]
    rows = [
        [
            escape(entry.label),
            escape(entry.precision or "–"),
            *(_value(column, column.values[place]) for column in columns),
        ]
        for place, entry in enumerate(report.entries)
    ]
    note = (
        "95% intervals in brackets. Δ: difference from the reference on the same images, in bold if its interval "
        "excludes 0."
    )
    if any(value.why and value.value is not None for column in columns for value in column.values):
        note += " ‡: measured on other images or cells than the rest of the column."
    meaning = "\n".join(f"- {escape(text)}" for text in definitions(report))
    return f"{_table(heads, rows)}\n\n{escape(note)}\n\n{meaning}"


def _value(column: Column, value: Value) -> str:
    unit = column.quantity.unit
    text = " ".join(part for part in (number(value, unit), interval_text(value.interval, unit)) if part)
    text = escape(text + ("‡" if value.why and value.value is not None else ""))
    change = difference_of(value, column.quantity)
    if change is None:
        return text
    shown = escape(f"Δ {change.text}")
    return f"{text}, **{shown}**" if change.verdict and change.verdict.is_clear else f"{text}, {shown}"


def _corruptions(group: Group) -> str:
    by_entry = [{error.name: error for error in corruption_errors_of(result)} for _, result in group.results]
    names = list(dict.fromkeys(name for errors in by_entry for name in errors))
    if not names:
        return ""
    rows = []
    for name in names:
        row = [escape(name)]
        for errors in by_entry:
            error = errors.get(name)
            if error is None:
                row.append("–")
                continue
            text = f"{100 * error.error:.1f} {interval_text(error.interval)}".strip()
            if error.difference is not None:
                text += f", Δ {points(error.difference)} {interval_text(error.difference_interval, signed=True)}"
            row.append(escape(text))
        rows.append(row)
    heads = ["corruption", *(entry.label for entry in group.entries)]
    return f"## {escape(group.suite)}: error by corruption, %\n\n{_table(heads, rows)}"


def _attacks(report: Report) -> str:
    heads = ["model", "attack", "ε", "correct", "top-1"]
    rows = [
        [
            escape(entry.label),
            escape(curve.attack),
            f"{255 * epsilon:g}/255",
            f"{right} of {attack.images}",
            f"{right / attack.images:.1%}",
        ]
        for entry in report.entries
        for attack in entry.attacks
        for curve in attack.curves
        for epsilon, right in curve.points
    ]
    return f"## Attacks\n\n{_table(heads, rows)}" if rows else ""


def _provenance(report: Report) -> str:
    lines = []
    for group in report.groups:
        for entry, result in group.results:
            settings = result["settings"]
            versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items() if value)
            facts = (
                f"{entry.label} on {group.suite}: data {dataset_name(result)}, limit {settings['limit']}, seed "
                f"{settings['seed']}, table {settings['table']}, resize "
                f"{'/'.join(sorted({cell['resize'] for cell in result['cells'].values()}))}, file SHA-256 "
                f"{entry.facts.get('sha256', 'unknown')}; {versions}"
            )
            lines.append(f"- {escape(facts)}")
    return "## How it was measured\n\n" + "\n".join(lines)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table. The cells of `rows` are Markdown; `heads` are plain text."""
    lines = [[escape(head) for head in heads], ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_csv(report: Report) -> str:
    """Return all cells of all results with their counts and metrics; missing values are empty.

    Text that a spreadsheet would interpret as a formula is prefixed with an apostrophe.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for entry in report.entries:
        for suite, result in entry.results.items():
            for cell in result["cells"]:
                writer.writerow([_csv_field(value) for value in _csv_row(entry, suite, result, cell)])
    return file.getvalue()


def _csv_row(entry: Entry, suite: str, result: Result, cell: str) -> list[object]:
    facts, metrics = result["cells"][cell], result["metrics"]["cells"][cell]
    counts, against = facts["counts"], metrics.get("against_reference") or {}
    corruption, _, severity = cell.partition("/")
    low, high = metrics["top1_interval"]
    difference = against.get("top1_difference_interval") or ("", "")
    return [
        *(entry.label, entry.precision, entry.facts.get("sha256", ""), suite, cell),
        *(corruption if severity else "", severity, facts["resize"], facts["images"], facts["names_sha256"]),
        *(counts["top1"], counts["top5"], counts["not_finite"], 1 - metrics["top1"], 1 - high, 1 - low),
        *(metrics["calibration_error"], metrics["rms_calibration_error"]),
        *(result["reference"]["name"] if against else "", counts["pairs"]["agree"] if against else ""),
        *(against.get("agreement", ""), against.get("top1_difference", ""), *difference),
    ]


def _csv_field(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.6f}"
    if isinstance(value, str):
        text = clean(value)
        return f"'{text}" if text.startswith(_FORMULA) else text
    return value
