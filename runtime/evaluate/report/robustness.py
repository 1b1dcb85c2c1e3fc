"""The page's part on corruptions: bars, severity curves, heat maps and the change against the reference."""

from __future__ import annotations

from runtime.evaluate.report.charts import Bar, Line, bars, lines
from runtime.evaluate.report.formatting import ends, points
from runtime.evaluate.report.markup import Markup, join, tag
from runtime.evaluate.report.numbers import CorruptionError, corruption_errors_of, severity_errors, verdict
from runtime.evaluate.report.plot import swatch
from runtime.evaluate.report.rows import CORRUPTED, Entry, Group, Report
from runtime.system.colors import level_of

__all__ = ["FAMILIES", "corruptions", "legend"]

FAMILIES = {
    "Noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "Blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "Weather": ("snow", "frost", "fog", "brightness"),
    "Digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "Not in mCE": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}
"""The corruptions by kind, as ImageNet-C groups them; the last four are for validation."""


def legend(entries: tuple[Entry, ...]) -> Markup:
    """Which sign is which model."""
    items = [tag("li", swatch(entry.place), tag("bdi", entry.label)) for entry in entries]
    return tag("ul", *items, class_="legend")


def corruptions(report: Report) -> Markup | None:
    """The section; None where no corruption was measured."""
    parts = []
    for group in report.groups:
        found = [(entry, corruption_errors_of(entry.results[group.suite])) for entry in group.entries]
        measured = [(entry, errors) for entry, errors in found if errors]
        if group.suite in CORRUPTED and measured:
            parts.append(_group(group, measured))
    return join(*parts) if parts else None


def _group(group: Group, found: list[tuple[Entry, list[CorruptionError]]]) -> Markup:
    result = found[0][0].results[group.suite]
    images = max(cell["images"] for cell in result["cells"].values())
    table = result["settings"]["table"]
    source = f"made on the fly by the table of severities {table!r}" if table else "as released"
    apart = f" {', '.join(entry.label for entry in group.entries)}: {group.apart}." if group.apart else ""
    return join(
        tag("h3", f"{group.suite}: error by corruption"),
        tag("p", f"{images:,} images a cell, corruptions {source}. Lower is better.{apart}", class_="quiet"),
        legend(group.entries),
        _bars(found),
        _changes(found),
        _curves(group, found),
        tag("h3", f"{group.suite}: error by corruption and severity, in percent"),
        _heat_maps(found),
    )


def _bars(found: list[tuple[Entry, list[CorruptionError]]]) -> Markup:
    by_entry = [(entry, {error.name: error for error in errors}) for entry, errors in found]
    ends_ = [max(error.error, *(error.interval or (0.0,))) for _, errors in found for error in errors]
    top = min(1.0, max(0.1, *ends_))
    panels = []
    for family, names in FAMILIES.items():
        rows = {
            _title(errors[name]): [
                Bar(place=entry.place, label=entry.label, value=own[name].error, interval=own[name].interval)
                for entry, own in by_entry
                if name in own
            ]
            for name in names
            for errors in [next((own for _, own in by_entry if name in own), {})]
            if name in errors
        }
        if rows:
            caption = tag("figcaption", tag("strong", family), ": error in %, mean over severities")
            panels.append(tag("figure", caption, bars(f"{family}: error by corruption", rows, top)))
    return tag("div", *panels, class_="panels pairs")


def _title(error: CorruptionError) -> str:
    levels = [str(level) for level, *_ in error.levels]
    name = error.name.replace("_", " ")
    return name if len(levels) == 5 else f"{name}, severity {', '.join(levels)} only"


def _changes(found: list[tuple[Entry, list[CorruptionError]]]) -> Markup:
    """Errors as a table; with the change against the reference where there is one."""
    heads = [tag("th", tag("bdi", entry.label), scope="col") for entry, _ in found]
    names = list(dict.fromkeys(error.name for _, errors in found for error in errors))
    by_entry = [{error.name: error for error in errors} for _, errors in found]
    rows = [
        tag("tr", tag("th", name.replace("_", " "), scope="row"), *(_change(own.get(name)) for own in by_entry))
        for name in names
    ]
    caption = (
        "Error in % with its interval; Δ: points more or fewer than the reference on the same images, colored where "
        "the interval excludes 0. Of fifteen such intervals one excludes 0 by chance now and then."
    )
    table = tag("table", tag("caption", caption), tag("thead", tag("tr", tag("th", "corruption", scope="col"), *heads)),
                tag("tbody", *rows))  # fmt: skip
    box = tag("div", table, class_="scroll", tabindex="0", role="region", aria_label="Errors by corruption")
    return tag("details", tag("summary", "The numbers, and the change against the reference"), box)


def _change(error: CorruptionError | None) -> Markup:
    if error is None:
        return tag("td", "–")
    parts = [f"{100 * error.error:.1f}", tag("small", ends(error.interval, "share"), class_="quiet")]
    if error.difference is not None:
        word = verdict(error.difference_interval, more_is_better=False)
        style = word if word in ("better", "worse") else "same"
        text = f"Δ {points(error.difference)} {ends(error.difference_interval, 'share', '+')}"
        parts.append(tag("small", text, class_=style, title=word or None))
    return tag("td", *parts)


def _curves(group: Group, found: list[tuple[Entry, list[CorruptionError]]]) -> Markup | None:
    """Error over severity: the mean, and every corruption."""
    mean = [(entry, severity_errors(entry.results[group.suite])) for entry, _ in found]
    every = list(dict.fromkeys(error.name for _, errors in found for error in errors if len(error.levels) > 1))
    if not every:
        return None
    panels = []
    if any(rows for _, rows in mean):
        content = [_line(entry, [(level, value) for level, value, _ in rows]) for entry, rows in mean]
        top = min(1.0, 1.1 * max(0.05, *(y for line in content for _, y in line.points)))
        chart = lines("Error by severity", content, top, "severity", "mean error")
        caption = tag("figcaption", tag("strong", "All"), ": mean over the corruptions")
        panels.append(tag("figure", caption, chart, class_="wide"))
    for name in every:
        own = [(entry, error) for entry, errors in found for error in errors if error.name == name]
        content = [_line(entry, [(level, value) for level, value, _ in error.levels]) for entry, error in own]
        title = name.replace("_", " ")
        chart = lines(title, content, 1.0, "severity", "error", small=True)
        panels.append(tag("figure", tag("figcaption", tag("strong", title)), chart))
    return join(
        tag("h3", f"{group.suite}: error by severity"),
        legend(group.entries),
        tag("div", *panels, class_="panels small"),
    )


def _line(entry: Entry, values: list[tuple[int, float]]) -> Line:
    return Line(place=entry.place, label=entry.label, points=tuple((float(level), value) for level, value in values))


def _heat_maps(found: list[tuple[Entry, list[CorruptionError]]]) -> Markup:
    compared = any(error.level_differences for _, errors in found for error in errors)
    note = "Below each error: points more or fewer than the reference, where they differ." if compared else None
    maps = [tag("div", _heat_map(entry, errors, compared), class_="card") for entry, errors in found]
    return join(tag("p", note, class_="quiet") if note else None, tag("div", *maps, class_="cards"))


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
        cells = [_heat(shown.get(level), (error.level_differences or {}).get(level)) for level in levels]
        rows.append(tag("tr", tag("th", error.name.replace("_", " "), scope="row"), *cells))
    caption = tag("caption", tag("strong", tag("bdi", entry.label)), ": error, %, by severity")
    return tag("table", caption, tag("thead", head), tag("tbody", *rows), class_="heat tall" if tall else "heat")


def _heat(value: float | None, difference: float | None) -> Markup:
    if value is None:
        return tag("td", "–")
    small = None
    if difference:
        small = tag("small", f"{100 * difference:+.{int(abs(difference) < 0.01)}f}".replace("-", "−"))
    return tag("td", f"{100 * value:.0f}", small, class_=f"h{level_of(value)}")
