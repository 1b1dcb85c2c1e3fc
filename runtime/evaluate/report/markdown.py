"""The report as Markdown, for a pull request or a wiki."""

from __future__ import annotations

import re
from collections.abc import Sequence

from runtime.evaluate.report.formatting import difference_of, ends, findings, number, points, subject
from runtime.evaluate.report.markup import clean
from runtime.evaluate.report.numbers import Value, columns_of, corruption_errors_of
from runtime.evaluate.report.rows import CORRUPTED, Group, Report

__all__ = ["to_markdown"]

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!&])")


def to_markdown(report: Report, title: str = "Accuracy and robustness") -> str:
    """Returns the numbers of the page; pictures are the page's own."""
    parts = [f"# {escape(title)}", escape(subject(report)), _findings(report), _headline(report)]
    parts += [_corruptions(group) for group in report.groups if group.suite in CORRUPTED]
    parts.append(_attacks(report))
    if report.gaps:
        parts.append("## What is not here\n\n" + "\n".join(f"- {escape(gap)}" for gap in report.gaps))
    parts.append(_provenance(report))
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: object) -> str:
    """Text as Markdown shows it, on one line: neither HTML nor links nor table borders."""
    return _SPECIAL.sub(r"\\\1", clean(text))


def _findings(report: Report) -> str:
    lines = []
    for name, compared, statements in findings(report):
        told = "; ".join(escape(text) + (f" – **{word}**" if word else "") for text, word in statements)
        lines.append(f"- **{escape(name)}** {escape(compared)}: {told}.")
    return "\n".join(lines)


def _headline(report: Report) -> str:
    columns = columns_of(report)
    heads = ["model", "precision", *(f"{column.title} ({column.of})" for column in columns)]
    rows = [
        [entry.label, entry.precision or "–", *(_value(column.values[place]) for column in columns)]
        for place, entry in enumerate(report.entries)
    ]
    note = (
        "In brackets 95 % intervals; Δ: difference from the reference on the same images; bold where its interval "
        "excludes 0. mCE counts in percent of AlexNet's errors, mean error is the plain share of wrong answers."
    )
    apart = any(value.why and value.value is not None for column in columns for value in column.values)
    note += " ‡: measured on other images or cells than the rest of its column." if apart else ""
    return f"{_table(heads, rows)}\n\n{escape(note)}"


def _value(value: Value) -> str:
    text = " ".join(part for part in (number(value), ends(value.interval, value.form)) if part)
    text += "‡" if value.why and value.value is not None else ""
    change, word = difference_of(value)
    return f"{text}, {_BOLD if word in ('better', 'worse') else ''}Δ {change}" if change else text


_BOLD = "\0"
"""Stands for bold until the text is escaped."""


def _corruptions(group: Group) -> str:
    by_entry = [{error.name: error for error in corruption_errors_of(result)} for _, result in group.results]
    names = list(dict.fromkeys(name for errors in by_entry for name in errors))
    if not names:
        return ""
    rows = []
    for name in names:
        row = [name]
        for errors in by_entry:
            error = errors.get(name)
            if error is None:
                row.append("–")
                continue
            text = f"{100 * error.error:.1f} {ends(error.interval, 'share')}".strip()
            if error.difference is not None:
                text += f", Δ {points(error.difference)} {ends(error.difference_interval, 'share', '+')}"
            row.append(text)
        rows.append(row)
    heads = ["corruption", *(entry.label for entry in group.entries)]
    return f"## {escape(group.suite)}: error by corruption, %\n\n{_table(heads, rows)}"


def _attacks(report: Report) -> str:
    heads = ["model", "attack", "ε", "right", "top-1"]
    rows = [
        [
            entry.label,
            curve.attack,
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
                f"{entry.label} on {group.suite}: data {result['data']['path']}, limit {settings['limit']}, seed "
                f"{settings['seed']}, table {settings['table']}, resize "
                f"{'/'.join(sorted({cell['resize'] for cell in result['cells'].values()}))}, file SHA-256 "
                f"{entry.facts.get('sha256', 'unknown')}; {versions}"
            )
            lines.append(f"- {escape(facts)}")
    return "## How it was measured\n\n" + "\n".join(lines)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[escape(head) for head in heads], ["---", *["---:"] * (len(heads) - 1)]]
    lines += [[_escaped(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(cell: str) -> str:
    before, bold, after = cell.partition(_BOLD)
    return escape(before) + (f"**{escape(after)}**" if bold else "")
