"""Write the report as one HTML page without scripts and external files."""

from __future__ import annotations

import base64

from runtime.evaluate.report.details import attacks, calibration, gaps, provenance, trade_offs
from runtime.evaluate.report.formatting import (
    conclusions,
    definitions,
    difference_of,
    findings,
    interval_text,
    number,
    subject,
    title_of,
)
from runtime.evaluate.report.markup import Markup, join, style_sheet, tag
from runtime.evaluate.report.numbers import Column, Value, columns_of
from runtime.evaluate.report.robustness import corruptions, verdict_class
from runtime.evaluate.report.rows import Entry, Report
from runtime.evaluate.report.text import to_csv

__all__ = ["to_html"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Content security policy: a browser loads and runs nothing, whatever a model's name contains."""


def to_html(report: Report, title: str = "", date: str = "") -> str:
    """Return the report as an HTML page.

    Args:
        report: the content.
        title: title of the page (default: the models and datasets).
        date: date in the title (default: none).
    """
    title = title or title_of(report)
    sections = [
        ("headline", "Numbers", _headline(report)),
        ("corruptions", "Corruptions", corruptions(report)),
        ("calibration", "Calibration", calibration(report)),
        ("trade-offs", "Accuracy against latency", trade_offs(report)),
        ("attacks", "Attacks", attacks(report)),
        ("gaps", "Missing or not compared", gaps(report)),
        ("provenance", "How it was measured", provenance(report)),
    ]
    shown = [(anchor, heading, body) for anchor, heading, body in sections if body is not None]
    links = [tag("li", tag("a", heading, href=f"#{anchor}")) for anchor, heading, _ in shown]
    top = tag(
        "header",
        tag("h1", title),
        tag("p", "Accuracy and robustness", f", {date}" if date else "", ". ", subject(report), class_="lead"),
        _verdict(report),
        tag("nav", tag("ul", *links), aria_label="Sections"),
        class_="top",
    )
    body = [
        tag(
            "section",
            tag("h2", heading, id=f"{anchor}-heading"),
            content,
            id=anchor,
            aria_labelledby=f"{anchor}-heading",
        )
        for anchor, heading, content in shown
    ]
    foot = tag("footer", "Made by advprop report from results of advprop eval. All intervals are 95% intervals.")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        tag("title", title),
        tag("style", Markup(style_sheet())),
    )
    page = tag("html", head, tag("body", top, tag("main", *body), foot), lang="en")
    return f"<!doctype html>\n{page}\n"


def _verdict(report: Report) -> Markup:
    """Return the verdict, or without a reference the reason why there is none."""
    found = conclusions(report)
    if not found:
        text = "No verdict: the models were not compared image by image. advprop compare MODEL… compares them."
        return tag("p", text, class_="verdict quiet")
    items = []
    for conclusion in found:
        parts: list[object] = []
        for text, verdict in conclusion.statements:
            is_clear = verdict is not None and verdict.is_clear
            parts += [tag("span", text, class_=verdict_class(verdict)) if is_clear else text, "; "]
        items.append(tag("li", tag("strong", tag("bdi", conclusion.model)), ": ", *parts[:-1], "."))
    reference = next((entry.label for entry in report.entries if entry.is_reference), "the reference")
    intro = tag("p", "Compared with ", tag("strong", tag("bdi", reference)), " on the same images:")
    return tag("div", intro, tag("ul", *items), class_="verdict", role="note", aria_label="Verdict")


def _headline(report: Report) -> Markup:
    explained = [tag("li", text) for text in definitions(report)]
    meaning = tag("ul", *explained, class_="meaning quiet") if explained else None
    return join(_table(report, columns_of(report)), meaning, _findings(report), _download(report))


def _findings(report: Report) -> Markup | None:
    items = []
    for finding in findings(report):
        statements = [
            join(text, *((" – ", tag("span", verdict.value, class_=verdict_class(verdict))) if verdict else ()))
            for text, verdict in finding.statements
        ]
        content = [part for statement in statements for part in (statement, "; ")][:-1]
        model = tag("strong", tag("bdi", finding.model))
        items.append(tag("li", model, f" {finding.compared_with}: ", *content, "."))
    if not items:
        return None
    return tag("details", tag("summary", "All differences, with intervals"), tag("ul", *items, class_="findings"))


def _table(report: Report, columns: list[Column]) -> Markup:
    caption = (
        "95% intervals in brackets. Δ: difference from the reference on the same images (of shares in percentage "
        "points), colored if its interval excludes 0."
    )
    if any(value.why and value.value is not None for column in columns for value in column.values):
        caption += " ‡: measured on other images or cells than the rest of the column; see Missing or not compared."
    heads = [
        tag("th", column.quantity.title, tag("small", column.measured_on), scope="col", role="columnheader")
        for column in columns
    ]
    first = [tag("th", name, scope="col", role="columnheader") for name in ("model", "precision")]
    rows = [
        _row(entry, [(column, column.values[place]) for column in columns])
        for place, entry in enumerate(report.entries)
    ]
    table = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *first, *heads, role="row"), role="rowgroup"),
        tag("tbody", *rows, role="rowgroup"),
        class_="headline",
        role="table",
    )
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label="Headline numbers")


def _row(entry: Entry, cells: list[tuple[Column, Value]]) -> Markup:
    note = join(" ", tag("span", "reference", class_="chip")) if entry.is_reference else None
    return tag(
        "tr",
        tag("th", tag("bdi", entry.label), note, scope="row", role="rowheader"),
        tag("td", tag("span", entry.precision or "–"), role="cell", data_label="precision"),
        *(_cell(column, value) for column, value in cells),
        role="row",
    )


def _cell(column: Column, value: Value) -> Markup:
    label, unit = f"{column.quantity.title} ({column.measured_on})", column.quantity.unit
    if value.value is None:
        shown = tag("span", "–", title=value.why or None)
        return tag("td", shown, role="cell", data_label=label, class_="nothing")
    parts = [tag("span", number(value, unit), "‡" if value.why else None, class_="value")]
    if value.interval:
        parts.append(tag("small", interval_text(value.interval, unit), class_="quiet"))
    change = difference_of(value, column.quantity)
    if change:
        tooltip = change.verdict.value if change.verdict else None
        parts.append(tag("small", f"Δ {change.text}", class_=verdict_class(change.verdict), title=tooltip))
    return tag("td", tag("div", *parts, title=value.why or None), role="cell", data_label=label)


def _download(report: Report) -> Markup:
    content = base64.b64encode(to_csv(report).encode()).decode()
    link = tag("a", "cells.csv", href=f"data:text/csv;charset=utf-8;base64,{content}", download="cells.csv")
    cells = sum(len(result["cells"]) for entry in report.entries for result in entry.results.values())
    return tag("p", "Raw numbers: ", link, f", {cells:,} cells with counts and intervals.", class_="downloads")
