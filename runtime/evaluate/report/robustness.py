"""Write the section on corruptions: bars, severity curves, heat maps and differences."""

from __future__ import annotations

from runtime.evaluate.report.charts import Bar, Line, bar_chart, severity_chart, swatch
from runtime.evaluate.report.formatting import interval_text, points
from runtime.evaluate.report.markup import Markup, join, tag
from runtime.evaluate.report.numbers import (
    CorruptionError,
    Verdict,
    corruption_errors_of,
    severity_errors,
    verdict_of,
)
from runtime.evaluate.report.rows import CORRUPTED, Entry, Group, Report
from runtime.system.colors import LEVELS, level_of

__all__ = ["corruptions", "legend", "verdict_class"]

_KINDS = {
    "Noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "Blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "Weather": ("snow", "frost", "fog", "brightness"),
    "Digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "Not in mCE": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}
"""The corruptions by kind, as ImageNet-C groups them. The last four are for validation."""

Errors = list[tuple[Entry, list[CorruptionError]]]
"""Models with their errors by corruption."""


def legend(entries: tuple[Entry, ...]) -> Markup:
    """Return the color and marker of each model."""
    items = [tag("li", swatch(entry.place), tag("bdi", entry.label)) for entry in entries]
    return tag("ul", *items, class_="legend")


def verdict_class(verdict: Verdict | None) -> str:
    """Return the CSS class of a difference."""
    return {Verdict.BETTER: "better", Verdict.WORSE: "worse"}.get(verdict or Verdict.UNCLEAR, "same")


def corruptions(report: Report) -> Markup | None:
    """Return the section; None if no corruption was measured."""
    parts = []
    for group in report.groups:
        found = [(entry, corruption_errors_of(entry.results[group.suite])) for entry in group.entries]
        measured = [(entry, errors) for entry, errors in found if errors]
        if group.suite in CORRUPTED and measured:
            parts.append(_group(group, measured))
    return join(*parts) if parts else None


def _group(group: Group, found: Errors) -> Markup:
    result = found[0][0].results[group.suite]
    images = max(cell["images"] for cell in result["cells"].values())
    table = result["settings"]["table"]
    source = f"computed on the fly with the table of severities {table!r}" if table else "as released"
    labels = ", ".join(entry.label for entry in group.entries)
    separate = f" {labels}: not compared, because {group.why_separate}." if group.why_separate else ""
    return join(
        tag("h3", f"{group.suite}: error by corruption"),
        tag("p", f"{images:,} images per cell, corruptions {source}. Lower is better.{separate}", class_="quiet"),
        legend(group.entries),
        _bars(found),
        _differences(found),
        _curves(group, found),
        tag("h3", f"{group.suite}: error by corruption and severity, in percent"),
        _heat_maps(found),
    )


def _bars(found: Errors) -> Markup:
    by_entry = [(entry, {error.name: error for error in errors}) for entry, errors in found]
    ends = [max(error.error, *(error.interval or (0.0,))) for _, errors in found for error in errors]
    top = min(1.0, max(0.1, *ends))
    panels = []
    for kind, names in _KINDS.items():
        rows = {}
        for name in names:
            own = [(entry, errors[name]) for entry, errors in by_entry if name in errors]
            if own:
                rows[_title(own[0][1])] = [
                    Bar(place=entry.place, label=entry.label, value=error.error, interval=error.interval)
                    for entry, error in own
                ]
        if rows:
            caption = tag("figcaption", tag("strong", kind), ": error in %, mean over severities")
            panels.append(tag("figure", caption, bar_chart(f"{kind}: error by corruption", rows, top)))
    return tag("div", *panels, class_="panels pairs")


def _title(error: CorruptionError) -> str:
    levels = [str(level) for level, *_ in error.levels]
    name = error.name.replace("_", " ")
    return name if len(levels) == 5 else f"{name}, severity {', '.join(levels)} only"


def _differences(found: Errors) -> Markup:
    """Return a table of errors with their differences from the reference."""
    heads = [tag("th", tag("bdi", entry.label), scope="col") for entry, _ in found]
    names = list(dict.fromkeys(error.name for _, errors in found for error in errors))
    by_entry = [{error.name: error for error in errors} for _, errors in found]
    rows = [
        tag("tr", tag("th", name.replace("_", " "), scope="row"), *(_difference(own.get(name)) for own in by_entry))
        for name in names
    ]
    caption = (
        "Error in % with its interval. Δ: difference from the reference on the same images in percentage points, "
        "colored if its interval excludes 0. Out of fifteen such intervals, one sometimes excludes 0 by chance."
    )
    head = tag("thead", tag("tr", tag("th", "corruption", scope="col"), *heads))
    table = tag("table", tag("caption", caption), head, tag("tbody", *rows))
    box = tag("div", table, class_="scroll", tabindex="0", role="region", aria_label="Errors by corruption")
    return tag("details", tag("summary", "Numbers, and differences from the reference"), box)


def _difference(error: CorruptionError | None) -> Markup:
    if error is None:
        return tag("td", "–")
    parts = [f"{100 * error.error:.1f}", tag("small", interval_text(error.interval), class_="quiet")]
    if error.difference is not None:
        verdict = verdict_of(error.difference_interval, higher_is_better=False)
        text = f"Δ {points(error.difference)} {interval_text(error.difference_interval, signed=True)}"
        parts.append(tag("small", text, class_=verdict_class(verdict), title=verdict and verdict.value))
    return tag("td", *parts)


def _curves(group: Group, found: Errors) -> Markup | None:
    """Return charts of error over severity: the mean, and each corruption."""
    mean = [(entry, severity_errors(entry.results[group.suite])) for entry, _ in found]
    names = list(dict.fromkeys(error.name for _, errors in found for error in errors if len(error.levels) > 1))
    if not names:
        return None
    panels = []
    highest = max(value for _, errors in found for error in errors for _, value, _ in error.levels)
    common = min(1.0, 1.1 * max(0.05, highest))
    if any(rows for _, rows in mean):
        lines = [_line(entry, [(level, value) for level, value, _ in rows]) for entry, rows in mean]
        top = min(1.0, 1.1 * max(0.05, *(y for line in lines for _, y in line.points)))
        chart = severity_chart("Error by severity", lines, top, "severity", "mean error")
        caption = tag("figcaption", tag("strong", "All"), ": mean over the corruptions")
        panels.append(tag("figure", caption, chart, class_="wide"))
    for name in names:
        own = [(entry, error) for entry, errors in found for error in errors if error.name == name]
        lines = [_line(entry, [(level, value) for level, value, _ in error.levels]) for entry, error in own]
        title = name.replace("_", " ")
        chart = severity_chart(title, lines, common, "severity", "error", small=True)
        panels.append(tag("figure", tag("figcaption", tag("strong", title)), chart))
    return join(
        tag("h3", f"{group.suite}: error by severity"),
        legend(group.entries),
        tag("div", *panels, class_="panels small"),
    )


def _line(entry: Entry, values: list[tuple[int, float]]) -> Line:
    return Line(place=entry.place, label=entry.label, points=tuple((float(level), value) for level, value in values))


def _heat_maps(found: Errors) -> Markup:
    compared = any(error.level_differences for _, errors in found for error in errors)
    note = "Small numbers are differences from the reference, in percentage points." if compared else None
    steps = [tag("span", class_=f"h{level}") for level in range(LEVELS)]
    key = tag(
        "p",
        tag("span", "0% wrong"),
        tag("span", *steps, class_="ramp", aria_hidden="true"),
        tag("span", "100% wrong"),
        class_="key quiet",
    )
    maps = [tag("div", _heat_map(entry, errors, compared), class_="card") for entry, errors in found]
    return join(key, tag("p", note, class_="quiet") if note else None, tag("div", *maps, class_="cards"))


def _heat_map(entry: Entry, errors: list[CorruptionError], tall: bool) -> Markup:
    levels = range(1, 6)
    head = tag(
        "tr",
        tag("th", "corruption", scope="col"),
        *(tag("th", level, scope="col", aria_label=f"severity {level}") for level in levels),
    )
    rows = []
    for error in errors:
        shown = {level: value for level, value, _ in error.levels}
        cells = [_heat_cell(shown.get(level), (error.level_differences or {}).get(level)) for level in levels]
        rows.append(tag("tr", tag("th", error.name.replace("_", " "), scope="row"), *cells))
    caption = tag("caption", tag("strong", tag("bdi", entry.label)), ": error, %, by severity")
    return tag("table", caption, tag("thead", head), tag("tbody", *rows), class_="heat tall" if tall else "heat")


def _heat_cell(value: float | None, difference: float | None) -> Markup:
    if value is None:
        return tag("td", "–")
    small = None
    if difference:
        small = tag("small", f"{100 * difference:+.{int(abs(difference) < 0.01)}f}".replace("-", "−"))
    return tag("td", f"{100 * value:.0f}", small, class_=f"h{level_of(value)}")
