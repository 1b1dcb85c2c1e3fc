"""The page's other parts: calibration, latency, attacks, what is missing, and how it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.evaluate.counts import Counts
from runtime.evaluate.report.charts import Line, Point, epsilon, pareto, reliability
from runtime.evaluate.report.markup import Markup, join, tag
from runtime.evaluate.report.measured import NOISE, Attack
from runtime.evaluate.report.numbers import Column, columns_of
from runtime.evaluate.report.plot import STYLES, swatch
from runtime.evaluate.report.robustness import legend
from runtime.evaluate.report.rows import Entry, Report, main_cell

__all__ = ["attacks", "calibration", "gaps", "provenance", "trade_offs"]


def calibration(report: Report) -> Markup | None:
    """Reliability diagrams on images that are not corrupted."""
    panels = []
    for group in report.groups:
        for entry, result in group.results:
            cell = main_cell(result)
            if cell is None:
                continue
            counts = Counts.from_dict(result["cells"][cell]["counts"])
            metrics = result["metrics"]["cells"][cell]
            name = f"{group.suite}, {cell}" if cell != "images" else group.suite
            caption = tag(
                "figcaption",
                tag("strong", tag("bdi", entry.label)),
                f" on {name}: ECE {metrics['calibration_error']:.3f}, "
                f"RMS {metrics['rms_calibration_error']:.3f}, {counts.images:,} images",
            )
            panels.append(tag("figure", caption, reliability(f"Reliability of {entry.label}", counts, entry.place)))
    if not panels:
        return None
    text = (
        "Bars: how many were right, by how sure the model was; on the dashed diagonal it is as sure as it is right. "
        "Dashed boxes: the gap. Below: where the images are. ECE is the mean gap over the images, in fifteen bins."
    )
    return join(tag("p", text, class_="quiet"), tag("div", *panels, class_="panels"))


def trade_offs(report: Report) -> Markup | None:
    """Accuracy and robustness against latency, a picture a device; None without latencies."""
    columns = columns_of(report)
    panels = []
    for latency in (column for column in columns if column.title == "p50 ms"):
        for column in columns:
            if column.title in ("top-1", "mCE", "mean error"):
                figure = _pareto(report, latency, column)
                panels += [figure] if figure else []
    if not panels:
        return None
    text = "The dashed line joins the models that no other beats in both."
    return join(tag("p", text, class_="quiet"), legend(report.entries), tag("div", *panels, class_="panels"))


def _pareto(report: Report, latency: Column, column: Column) -> Markup | None:
    found = [
        Point(
            place=entry.place,
            label=entry.label,
            x=x.value,
            y=y.value,
            interval=None if y.interval is None else (y.interval[0], y.interval[1]),
        )
        for entry, x, y in zip(report.entries, latency.values, column.values, strict=True)
        if x.value is not None and y.value is not None and not y.why
    ]
    if not found:
        return None
    better = "higher" if column.title == "top-1" else "lower"
    title = f"{column.title} ({column.of}; {better} is better) against p50 latency on {latency.of}"
    y_title = "mCE, AlexNet = 100" if column.title == "mCE" else column.title
    chart = pareto(title, found, y_title, more_is_better=column.title == "top-1", share=column.title != "mCE")
    return tag("figure", tag("figcaption", tag("strong", column.title), f", {column.of}; {latency.of}"), chart)


def attacks(report: Report) -> Markup | None:
    """Accuracy against ε, a picture a model and set of images."""
    panels, rows = [], []
    every = [curve.attack for entry in report.entries for attack in entry.attacks for curve in attack.curves]
    places = {name: place for place, name in enumerate(dict.fromkeys(every), STYLES // 2)}  # not the first models'
    for entry in report.entries:
        for attack in entry.attacks:
            own = _lines(attack, places)
            caption = tag("figcaption", tag("strong", tag("bdi", entry.label)), f": {attack.images:,} images")
            keys = tag(
                "ul", *(tag("li", swatch(line.place, line.control), line.label) for line in own), class_="legend"
            )
            panels.append(tag("figure", caption, epsilon(f"{entry.label} under attack", own), keys))
            rows += _attack_rows(entry, attack)
    if not panels:
        return None
    text = (
        "Top-1 of images changed by at most ε. The dashed line is the control: random noise of the same size. An "
        "attack that does no more than the noise has found nothing; transfer alone flatters a quantized model."
    )
    heads = [tag("th", name, scope="col") for name in ("model", "attack", "ε", "right", "top-1", "queries")]
    table = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows))
    box = tag("div", table, class_="scroll", tabindex="0", role="region", aria_label="Attacks in numbers")
    return join(
        tag("p", text, class_="quiet"),
        tag("div", *panels, class_="panels"),
        tag("details", tag("summary", "The numbers"), box),
    )


def _lines(attack: Attack, places: Mapping[str, int]) -> list[Line]:
    """An attack looks the same in every model's picture."""
    return [
        Line(
            place=places[curve.attack],
            label=curve.attack,
            points=tuple((255 * epsilon_, right / attack.images) for epsilon_, right in curve.points),
            control=curve.attack == NOISE,
        )
        for curve in sorted(attack.curves, key=lambda curve: curve.attack == NOISE)
        if curve.points
    ]


def _attack_rows(entry: Entry, attack: Attack) -> list[Markup]:
    return [
        tag(
            "tr",
            tag("th", tag("bdi", entry.label), scope="row"),
            tag("td", curve.attack),
            tag("td", f"{255 * epsilon_:g}/255"),
            tag("td", f"{right} of {attack.images}"),
            tag("td", f"{right / attack.images:.1%}"),
            tag("td", "–" if curve.queries is None else f"{curve.queries:,}"),
        )
        for curve in attack.curves
        for epsilon_, right in curve.points
    ]


def gaps(report: Report) -> Markup | None:
    """What is not there, and why."""
    return tag("ul", *(tag("li", gap) for gap in report.gaps)) if report.gaps else None


def provenance(report: Report) -> Markup:
    """Models, data, settings, versions and files."""
    models = [
        tag("div", tag("h4", tag("bdi", entry.label)), _facts(entry.facts, leave=("name",)), class_="card")
        for entry in report.entries
    ]
    runs = [_run(entry, result) for group in report.groups for entry, result in group.results]
    same: dict[str, list[str]] = {}
    for label, body in runs:
        same.setdefault(body, []).append(label)
    measured = [
        tag("div", tag("h4", tag("bdi", ", ".join(labels))), Markup(body), class_="card")
        for body, labels in same.items()
    ]
    files = [tag("tr", tag("th", name, scope="row"), tag("td", tag("code", sha256))) for name, sha256 in report.files]
    heads = tag("tr", tag("th", "file", scope="col"), tag("th", "SHA-256", scope="col"))
    table = tag("table", tag("thead", heads), tag("tbody", *files))
    box = tag("div", table, class_="scroll", tabindex="0", role="region", aria_label="Files")
    return join(
        tag("h3", "Models"),
        tag("div", *models, class_="cards"),
        tag("h3", "Measurements"),
        tag("div", *measured, class_="cards"),
        tag("details", tag("summary", f"The {len(files)} files this page was made of"), box),
    )


def _run(entry: Entry, result: Mapping[str, Any]) -> tuple[str, Markup]:
    cells, settings = result["cells"], result["settings"]
    preprocessing = settings["preprocessing"]
    facts = {
        "suite": result["suite"],
        "data": result["data"]["path"],
        "clean images": result["data"].get("clean"),
        "folders left out": ", ".join(result["data"].get("skipped", ())),
        "images": _range(cell["images"] for cell in cells.values()),
        "cells": len(cells),
        "limit": settings["limit"],
        "seed": settings["seed"],
        "table of severities": settings["table"],
        "resize": ", ".join(sorted({cell["resize"] for cell in cells.values()})),
        "classes asked": settings["classes_asked"],
        "batch size": settings["batch_size"],
        "reference": result["reference"]["name"] if result["reference"] else None,
        "names and labels": ", ".join(sorted({cell["names_sha256"] for cell in cells.values()})[:3]),
        "preprocessing": ", ".join(f"{key} {value}" for key, value in preprocessing.items()),
        "versions": ", ".join(f"{key} {value}" for key, value in result["versions"].items() if value),
    }
    return entry.label, _facts(facts)


def _range(values: Any) -> str:
    found = sorted(set(values))
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"


def _facts(facts: Mapping[str, Any], leave: tuple[str, ...] = ()) -> Markup:
    pairs = []
    for key, value in facts.items():
        if key in leave or value is None or value == "":
            continue
        shown = tag("code", value) if "sha256" in key or key in ("data", "names and labels") else str(value)
        pairs += [tag("dt", key.replace("_", " ")), tag("dd", shown)]
    return tag("dl", *pairs)
