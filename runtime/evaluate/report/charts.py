"""Draw SVG charts that are narrow enough for a phone. Their colors are CSS classes of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from runtime.evaluate.counts import BINS, NANO, Counts
from runtime.evaluate.intervals import Interval
from runtime.evaluate.metrics import calibration_error
from runtime.evaluate.report.markup import Markup, join, tag

__all__ = [
    "STYLES",
    "Bar",
    "Line",
    "Point",
    "bar_chart",
    "epsilon_chart",
    "pareto_chart",
    "pareto_front",
    "reliability_diagram",
    "severity_chart",
    "swatch",
]

STYLES = 6
"""Number of colors and markers. From the seventh model on they repeat, with dashed lines."""

_BANDS = 3
"""Number of steps by which lines get wider, to be visible below a line that coincides."""

_DASHES = ("", "6 3", "2 3", "8 3 2 3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of a chart."""

    place: int
    """Number of the model or attack, which determines color and marker."""
    label: str
    points: tuple[tuple[float, float], ...]
    is_control: bool = False
    """Whether the line is the control, which is drawn dashed and gray."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A bar of one model."""

    place: int
    """Number of the model."""
    label: str
    value: float
    """From 0 to 1."""
    interval: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A model in a scatter plot."""

    place: int
    """Number of the model."""
    label: str
    x: float
    y: float
    interval: Interval | None = None
    """Interval of y."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """The plot area, in pixels of the figure."""

    x: tuple[float, float]
    """Range of the data."""
    y: tuple[float, float]
    """Range of the data."""
    width: float = 340
    height: float = 240
    left: float = 50
    right: float = 12
    top: float = 10
    bottom: float = 40

    def px(self, value: float) -> float:
        """Return the horizontal position of a value."""
        low, high = self.x
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def py(self, value: float) -> float:
        """Return the vertical position of a value."""
        low, high = self.y
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom)

    def axes(
        self,
        x_ticks: Sequence[float],
        y_ticks: Sequence[float],
        x_title: str = "",
        y_title: str = "",
        x_form: Callable[[float], str] = "{:g}".format,
        y_form: Callable[[float], str] = "{:g}".format,
    ) -> Markup:
        """Return grid lines, tick labels and titles."""
        floor, end = self.height - self.bottom, self.width - self.right
        parts = []
        for value in y_ticks:
            y = self.py(value)
            parts.append(tag("line", x1=self.left, x2=end, y1=y, y2=y, class_="grid"))
            parts.append(tag("text", y_form(value), x=self.left - 5, y=y + 3.5, class_="tick", text_anchor="end"))
        for value in x_ticks:
            x = self.px(value)
            parts.append(tag("line", x1=x, x2=x, y1=floor, y2=floor + 4, class_="axis"))
            parts.append(tag("text", x_form(value), x=x, y=floor + 15, class_="tick", text_anchor="middle"))
        parts.append(tag("line", x1=self.left, x2=end, y1=floor, y2=floor, class_="axis"))
        middle = (self.left + end) / 2
        if x_title:
            parts.append(tag("text", x_title, x=middle, y=self.height - 6, class_="title", text_anchor="middle"))
        if y_title:
            y = (self.top + floor) / 2
            turn = f"translate(10 {y:.1f}) rotate(-90)"
            parts.append(tag("text", y_title, transform=turn, class_="title", text_anchor="middle"))
        return join(*parts)


def severity_chart(
    title: str, lines: Sequence[Line], top: float, x_title: str, y_title: str, small: bool = False
) -> Markup:
    """Return a chart of error over severity, from 0 to `top`."""
    size = {"width": 188.0, "height": 150.0, "left": 48.0, "bottom": 34.0, "right": 8.0} if small else {}
    frame = _Frame(x=(0.6, 5.4), y=(0, top), **size)
    description = "; ".join(
        f"{line.label}: {', '.join(f'{x:g}: {y:.1%}' for x, y in line.points)}" for line in lines if line.points
    )
    # Lines that coincide stay visible: each is moved by some pixels, and wider than those above it.
    drawn = [
        _series(
            frame,
            line,
            shift=(rank - (len(lines) - 1) / 2) * min(4.5 if small else 7.0, 24 / len(lines)),
            width=1.5 + 1.2 * min(rank, _BANDS),
        )
        for rank, line in enumerate(lines)
        if line.points
    ][::-1]
    axes = frame.axes(
        [1, 2, 3, 4, 5],
        _ticks(0, top, 2 if small else 5),
        x_title=x_title,
        y_title=y_title,
        y_form=_percent,
    )
    return _figure(frame, title, f"{y_title} by {x_title}. {description}", axes, *drawn)


def bar_chart(title: str, rows: Mapping[str, Sequence[Bar]], top: float) -> Markup:
    """Return horizontal bars with intervals, one group per corruption, from 0 to `top`."""
    thickness, gap, head = 9.0, 3.0, 17.0
    height = sum(head + len(row) * (thickness + gap) + 6 for row in rows.values()) + 36
    frame = _Frame(x=(0, top), y=(0, 1), height=height, left=12, right=44, top=4, bottom=34)
    parts, y, description = [], 4.0, []
    for value in _ticks(0, top, 4):
        x = frame.px(value)
        parts.append(tag("line", x1=x, x2=x, y1=4, y2=height - 34, class_="grid"))
        parts.append(tag("text", _percent(value), x=x, y=height - 20, class_="tick", text_anchor="middle"))
    parts.append(tag("text", "error", x=frame.px(top / 2), y=height - 5, class_="title", text_anchor="middle"))
    for name, row in rows.items():
        parts.append(tag("text", name, x=frame.left, y=y + 12, class_="label"))
        y += head
        for bar in row:
            parts.append(_bar(frame, bar, y, thickness))
            y += thickness + gap
        y += 6
        description.append(f"{name}: {', '.join(f'{bar.label} {bar.value:.1%}' for bar in row)}")
    return _figure(frame, title, "; ".join(description), *parts)


def _bar(frame: _Frame, bar: Bar, y: float, thickness: float) -> Markup:
    start, end, middle = frame.px(0), frame.px(bar.value), y + thickness / 2
    style = bar.place % STYLES
    parts = [tag("rect", x=start, y=y, width=max(0.5, end - start), height=thickness, class_=f"bar s{style}", rx=1.5)]
    right = end
    if bar.interval:
        low, high = (frame.px(min(max(value, 0), frame.x[1])) for value in bar.interval)
        right = max(end, high)
        stop = f"{y + 1:.1f}v{thickness - 2:g}"
        path = f"M{low:.1f} {middle:.1f}H{high:.1f}M{low:.1f} {stop}M{high:.1f} {stop}"
        parts.append(tag("path", d=path, class_="whisker"))
    parts.append(tag("text", f"{100 * bar.value:.1f}", x=right + 5, y=y + thickness - 0.8, class_="number"))
    return join(*parts)


def reliability_diagram(title: str, counts: Counts, place: int) -> Markup:
    """Return accuracy over confidence in fifteen bins, and below it the share of images."""
    frame = _Frame(x=(0, 1), y=(0, 1), width=312, height=312, bottom=84, right=22)
    parts = [frame.axes((), (0, 0.25, 0.5, 0.75, 1), y_title="accuracy", y_form=_percent)]
    floor, largest, description = frame.py(0), max(counts.bin_images) or 1, []
    for number in range(BINS):
        images, right = counts.bin_images[number], counts.bin_right[number]
        if not images:
            continue
        left, right_end = frame.px(number / BINS) + 1, frame.px((number + 1) / BINS) - 1
        accuracy, confidence = right / images, counts.bin_confidence_nano[number] / NANO / images
        y, level = frame.py(accuracy), frame.py(confidence)
        box = {"x": left, "width": right_end - left}
        parts.append(tag("rect", **box, y=y, height=floor - y, class_=f"bar s{place % STYLES}"))
        parts.append(tag("rect", **box, y=min(y, level), height=abs(level - y), class_="gap"))
        share = 26 * images / largest
        parts.append(tag("rect", **box, y=frame.height - 48 - share + 14, height=share, class_="share"))
        description.append(f"confidence {confidence:.0%}, accuracy {accuracy:.0%} ({images} images)")
    parts.append(tag("path", d=f"M{frame.px(0)} {floor:.1f}L{frame.px(1)} {frame.py(1):.1f}", class_="ideal"))
    base = frame.height - 34
    parts.append(tag("line", x1=frame.px(0), x2=frame.px(1), y1=base, y2=base, class_="axis"))
    parts += [
        tag("text", _percent(value), x=frame.px(value), y=base + 12, class_="tick", text_anchor="middle")
        for value in (0, 0.25, 0.5, 0.75, 1)
    ]
    parts.append(tag("text", "confidence", x=frame.px(0.5), y=frame.height - 1, class_="title", text_anchor="middle"))
    parts.append(tag("text", "images", x=frame.left - 5, y=base - 8, class_="tick", text_anchor="end"))
    ece = f"expected calibration error {calibration_error(counts):.3f}"
    return _figure(frame, title, f"{ece}. {'; '.join(description)}", *parts)


def pareto_front(points: Sequence[Point], higher_is_better: bool) -> list[Point]:
    """Return the points that no other point dominates, in order of latency."""
    sign = -1 if higher_is_better else 1
    best, found = float("inf"), []
    for point in sorted(points, key=lambda point: (point.x, sign * point.y)):
        if sign * point.y < best:
            best = sign * point.y
            found.append(point)
    return found


def pareto_chart(
    title: str, points: Sequence[Point], y_title: str, higher_is_better: bool, is_share: bool = True
) -> Markup:
    """Return models by latency, with a line through the Pareto front."""
    ends = [end for point in points for end in (point.y, *(point.interval or ()))]
    low, high = min(ends), max(ends)
    margin = max(0.08 * (high - low), 0.01 if is_share else 1)
    frame = _Frame(
        x=(0, 1.12 * max(point.x for point in points)), y=(max(-margin / 2, low - margin), high + margin), height=270
    )
    y_form = (lambda value: f"{100 * value:.3g}%") if is_share else "{:g}".format
    parts = [
        frame.axes(
            _ticks(*frame.x),
            _ticks(max(0, frame.y[0]), frame.y[1]),
            "p50 latency, ms (left is better)",
            y_title,
            "{:g}".format,
            y_form,
        )
    ]
    front = pareto_front(points, higher_is_better)
    path = "L".join(f"{frame.px(point.x):.1f} {frame.py(point.y):.1f}" for point in front)
    parts.append(tag("path", d=f"M{path}", class_="front"))
    for point in points:
        x = frame.px(point.x)
        if point.interval:
            low_y, high_y = (frame.py(end) for end in point.interval)
            parts.append(tag("path", d=f"M{x:.1f} {low_y:.1f}V{high_y:.1f}", class_="whisker"))
        parts.append(_marker(point.place, x, frame.py(point.y), 5))
    parts.append(_point_labels(frame, points))
    form = "{:.1%}" if is_share else "{:.1f}"
    description = "; ".join(f"{point.label}: {point.x:g} ms, {form.format(point.y)}" for point in points)
    on_front = ", ".join(point.label for point in front)
    return _figure(frame, title, f"{description}. Pareto front: {on_front}", *parts)


def _point_labels(frame: _Frame, points: Sequence[Point]) -> Markup:
    """Return labels next to their points, moved down if they would overlap."""
    parts: list[Markup] = []
    taken: list[tuple[float, float, float]] = []
    for point in sorted(points, key=lambda point: frame.py(point.y)):
        x, y = frame.px(point.x), frame.py(point.y) - 6
        label = point.label if len(point.label) <= 26 else point.label[:25] + "…"
        right, wide = x > frame.width * 0.55, 7.0 * len(label)
        start = x - 8 - wide if right else x + 8
        for left, end, height in taken:
            if left < start + wide and start < end:
                y = max(y, height + 13)
        taken.append((start, start + wide, y))
        at = {"x": x - 8 if right else x + 8, "y": y, "text_anchor": "end" if right else "start"}
        parts.append(tag("text", label, class_="label", **at))
    return join(*parts)


def epsilon_chart(title: str, lines: Sequence[Line]) -> Markup:
    """Return accuracy over ε, in units of 1/255."""
    largest = max(x for line in lines for x, _ in line.points)
    frame = _Frame(x=(0, largest or 1), y=(0, 1), right=20)
    description = "; ".join(
        f"{line.label}: {', '.join(f'{x:g}/255: {y:.1%}' for x, y in line.points)}" for line in lines
    )
    axes = frame.axes(
        _ticks(0, largest, 5), (0, 0.25, 0.5, 0.75, 1), "ε, in 1/255 of the pixel range", "top-1", y_form=_percent
    )
    return _figure(frame, title, description, axes, *(_series(frame, line) for line in lines))


def swatch(place: int, is_control: bool = False) -> Markup:
    """Return the line and marker of a model or attack for a legend."""
    line = _path("M1 8L27 8", place, is_control)
    mark = _marker(place, 14, 8, is_control=is_control)
    return tag("svg", line, mark, viewBox="0 0 28 16", class_="swatch", aria_hidden="true")


def _figure(frame: _Frame, title: str, description: str, *content: Markup) -> Markup:
    """Return an SVG with a text alternative."""
    return tag(
        "svg",
        tag("title", title),
        tag("desc", description),
        *content,
        viewBox=f"0 0 {frame.width:g} {frame.height:g}",
        role="img",
        aria_label=f"{title}. {description}",
    )


def _series(frame: _Frame, line: Line, shift: float = 0, width: float = 2) -> Markup:
    """Return a line with markers, moved to the right by `shift` pixels."""
    places = [(frame.px(x) + shift, frame.py(y)) for x, y in line.points]
    path = f"M{'L'.join(f'{x:.1f} {y:.1f}' for x, y in places)}"
    marks = (_marker(line.place, x, y, is_control=line.is_control) for x, y in places)
    return join(_path(path, line.place, line.is_control, width), *marks)


def _path(path: str, place: int, is_control: bool, width: float = 2) -> Markup:
    dash = "4 3" if is_control else _DASHES[place // STYLES % len(_DASHES)]
    style = f"stroke-width:{width:g}px"
    return tag("path", d=path, class_=f"line {_style(place, is_control)}", stroke_dasharray=dash or None, style=style)


def _style(place: int, is_control: bool) -> str:
    return "control" if is_control else f"s{place % STYLES}"


def _marker(place: int, x: float, y: float, size: float = 3.6, is_control: bool = False) -> Markup:
    """Return a marker. Each color has its own shape, which keeps charts readable without colors."""
    style = f"mark {_style(place, is_control)}"
    shape = place % STYLES
    if shape == 0:
        return tag("circle", cx=x, cy=y, r=size, class_=style)
    r = size * 1.15
    t = r / 2.2
    corners = {
        1: [(-r, -r), (r, -r), (r, r), (-r, r)],
        2: [(0, -r * 1.3), (r * 1.2, r), (-r * 1.2, r)],
        3: [(0, -r * 1.4), (r * 1.4, 0), (0, r * 1.4), (-r * 1.4, 0)],
        4: [(0, r * 1.3), (r * 1.2, -r), (-r * 1.2, -r)],
        5: [
            *((-t, -r), (t, -r), (t, -t), (r, -t), (r, t), (t, t)),
            *((t, r), (-t, r), (-t, t), (-r, t), (-r, -t), (-t, -t)),
        ],
    }[shape]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return tag("polygon", points=points, class_=style)


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers between two numbers."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def _percent(value: float) -> str:
    """Return a share in percent, for tick labels."""
    return f"{100 * value:g}%"
