"""Write sections of the page: calibration, latency, attacks, gaps and provenance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from runtime.evaluate.attacks.config import NOISE
from runtime.evaluate.attacks.results import WORST
from runtime.evaluate.counts import Counts
from runtime.evaluate.report.charts import (
    STYLES,
    Line,
    Point,
    epsilon_chart,
    pareto_chart,
    reliability_diagram,
    swatch,
)
from runtime.evaluate.report.inputs import Attack
from runtime.evaluate.report.markup import Markup, join, tag
from runtime.evaluate.report.numbers import Column, Quantity, Unit, columns_of
from runtime.evaluate.report.robustness import legend
from runtime.evaluate.report.rows import Entry, Report, uncorrupted_cell
from runtime.evaluate.results import dataset_name

__all__ = ["attacks", "calibration", "gaps", "provenance", "trade_offs"]


def calibration(report: Report) -> Markup | None:
    """Return reliability diagrams on uncorrupted images; None if there are none."""
    panels = []
    for group in report.groups:
        for entry, result in group.results:
            cell = uncorrupted_cell(result)
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
            diagram = reliability_diagram(f"Reliability of {entry.label}", counts, entry.place)
            panels.append(tag("figure", caption, diagram))
    if not panels:
        return None
    text = (
        "Bars show the accuracy of images by the model's confidence. On the dashed diagonal, accuracy equals "
        "confidence; dashed boxes show the gap. The bars below show the number of images in each bin. ECE is "
        "the mean gap over all images, with fifteen bins."
    )
    return join(tag("p", text, class_="quiet"), tag("div", *panels, class_="panels"))


def trade_offs(report: Report) -> Markup | None:
    """Return charts of accuracy and robustness against latency; None without latencies."""
    columns = columns_of(report)
    panels = []
    for latency in (column for column in columns if column.quantity is Quantity.LATENCY):
        for column in columns:
            if column.quantity in (Quantity.TOP1, Quantity.MCE, Quantity.MCE_REFERENCE, Quantity.MEAN_ERROR):
                # Models that were measured on other images have a figure of their own.
                for why in dict.fromkeys(value.why for value in column.values if value.value is not None):
                    figure = _pareto(report, latency, column, why)
                    panels += [figure] if figure else []
    if not panels:
        return None
    text = "The dashed line connects the models of the Pareto front: no other model is both faster and better."
    return join(tag("p", text, class_="quiet"), legend(report.entries), tag("div", *panels, class_="panels"))


def _pareto(report: Report, latency: Column, column: Column, why: str) -> Markup | None:
    """Return the chart of the models that `why` separates from the others ("": those that it does not)."""
    found = [
        Point(
            place=entry.place,
            label=entry.label,
            x=x.value,
            y=y.value,
            interval=None if y.interval is None else (y.interval[0], y.interval[1]),
        )
        for entry, x, y in zip(report.entries, latency.values, column.values, strict=True)
        if x.value is not None and y.value is not None and y.why == why
    ]
    if not found:
        return None
    quantity = column.quantity
    better = "higher" if quantity.higher_is_better else "lower"
    title = f"{quantity.title} ({column.measured_on}; {better} is better) against p50 latency on {latency.measured_on}"
    chart = pareto_chart(
        title,
        found,
        quantity.title,
        higher_is_better=quantity.higher_is_better,
        is_share=quantity.unit is Unit.SHARE,
    )
    caption = tag(
        "figcaption",
        tag("strong", quantity.title),
        f", {column.measured_on}; latency on {latency.measured_on}",
        f". Separate, because {why}" if why else None,
    )
    return tag("figure", caption, chart)


def attacks(report: Report) -> Markup | None:
    """Return charts of accuracy against ε, one per model and images; None without attacks."""
    panels, rows = [], []
    names = [curve.attack for entry in report.entries for attack in entry.attacks for curve in attack.curves]
    # Colors of attacks are offset, to differ from those of models.
    places = {name: place for place, name in enumerate(dict.fromkeys(names), STYLES // 2)}
    for entry in report.entries:
        for attack in entry.attacks:
            lines = _attack_lines(attack, places)
            caption = tag("figcaption", tag("strong", tag("bdi", entry.label)), f": {attack.images:,} images")
            keys = tag(
                "ul", *(tag("li", swatch(line.place, line.is_control), line.label) for line in lines), class_="legend"
            )
            panels.append(tag("figure", caption, epsilon_chart(f"{entry.label} under attack", lines), keys))
            rows += _attack_rows(entry, attack)
    if not panels:
        return None
    control = (
        "The dashed line is the control: random noise of the same size. An attack that fools no more images than noise "
        "is ineffective. "
    )
    text = (
        f"Top-1 on images in which each pixel changes by at most ε. {control if NOISE in names else ''}Transfer alone "
        "overestimates a quantized model."
    )
    heads = [tag("th", name, scope="col") for name in ("model", "attack", "ε", "correct", "top-1", "queries")]
    table = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows))
    box = tag("div", table, class_="scroll", tabindex="0", role="region", aria_label="Attacks in numbers")
    return join(
        tag("p", text, class_="quiet"),
        tag("div", *panels, class_="panels"),
        tag("details", tag("summary", "Numbers"), box),
    )


def _attack_lines(attack: Attack, places: Mapping[str, int]) -> list[Line]:
    """Return the lines of a chart. An attack has the same color for every model.

    The worst of a single attack is that attack, so it gets no line of its own.
    """
    alone = len([curve for curve in attack.curves if curve.attack not in (NOISE, WORST)]) == 1
    return [
        Line(
            place=places[curve.attack],
            label=curve.attack,
            points=tuple((255 * epsilon, right / attack.images) for epsilon, right in curve.points),
            is_control=curve.attack == NOISE,
        )
        for curve in sorted(attack.curves, key=lambda curve: curve.attack == NOISE)
        if curve.points and not (alone and curve.attack == WORST)
    ]


def _attack_rows(entry: Entry, attack: Attack) -> list[Markup]:
    return [
        tag(
            "tr",
            tag("th", tag("bdi", entry.label), scope="row"),
            tag("td", curve.attack),
            tag("td", f"{255 * epsilon:g}/255"),
            tag("td", f"{right} of {attack.images}"),
            tag("td", f"{right / attack.images:.1%}"),
            tag("td", "–" if curve.queries is None else f"{curve.queries:,}"),
        )
        for curve in attack.curves
        for epsilon, right in curve.points
    ]


def gaps(report: Report) -> Markup | None:
    """Return the list of missing measurements and comparisons; None if it is empty."""
    return tag("ul", *(tag("li", gap) for gap in report.gaps)) if report.gaps else None


def provenance(report: Report) -> Markup:
    """Return models, data, settings, versions and files."""
    models = [
        tag("div", tag("h4", tag("bdi", entry.label)), _model_facts(entry.facts), class_="card")
        for entry in report.entries
    ]
    same: dict[Markup, list[str]] = {}
    for group in report.groups:
        for entry, result in group.results:
            same.setdefault(_run_facts(result), []).append(entry.label)
    runs = [
        tag("div", tag("h4", tag("bdi", ", ".join(labels))), facts, class_="card") for facts, labels in same.items()
    ]
    files = [tag("tr", tag("th", name, scope="row"), tag("td", tag("code", sha256))) for name, sha256 in report.files]
    heads = tag("tr", tag("th", "file", scope="col"), tag("th", "SHA-256", scope="col"))
    table = tag("table", tag("thead", heads), tag("tbody", *files))
    box = tag("div", table, class_="scroll", tabindex="0", role="region", aria_label="Files")
    return join(
        tag("h3", "Models"),
        tag("div", *models, class_="cards"),
        tag("h3", "Measurements"),
        tag("div", *runs, class_="cards"),
        tag("details", tag("summary", f"The {len(files)} files that this page was made from"), box),
    )


def _model_facts(facts: Mapping[str, Any]) -> Markup:
    shown = {key: value for key, value in facts.items() if key != "name"}
    return _fact_list(
        (key.replace("_", " "), tag("code", value) if value and key.endswith("sha256") else value)
        for key, value in shown.items()
    )


def _run_facts(result: Mapping[str, Any]) -> Markup:
    cells, settings, data = result["cells"], result["settings"], result["data"]
    hashes = ", ".join(sorted({cell["names_sha256"] for cell in cells.values()})[:3])
    return _fact_list(
        [
            ("suite", result["suite"]),
            ("data", tag("code", dataset_name(result))),
            ("clean images", dataset_name(result, "clean")),
            ("skipped folders", ", ".join(data.get("skipped", ()))),
            ("images", _range(cell["images"] for cell in cells.values())),
            ("cells", len(cells)),
            ("limit", settings["limit"]),
            ("seed", settings["seed"]),
            ("table of severities", settings["table"]),
            ("resize", ", ".join(sorted({cell["resize"] for cell in cells.values()}))),
            ("classes to choose from", settings["classes_asked"]),
            ("batch size", settings["batch_size"]),
            ("reference", result["reference"]["name"] if result["reference"] else None),
            ("hash of names and labels", tag("code", hashes)),
            ("preprocessing", ", ".join(f"{key} {value}" for key, value in settings["preprocessing"].items())),
            ("versions", ", ".join(f"{key} {value}" for key, value in result["versions"].items() if value)),
        ]
    )


def _range(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"


def _fact_list(facts: Iterable[tuple[str, Any]]) -> Markup:
    """Return (title, value) pairs as a definition list, without empty values."""
    pairs = []
    for title, value in facts:
        if value is not None and value != "":
            pairs += [tag("dt", title), tag("dd", value if isinstance(value, Markup) else str(value))]
    return tag("dl", *pairs)
