"""The pictures of a report, each narrow enough for a phone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.evaluate.counts import BINS, NANO, Counts
from runtime.evaluate.intervals import Interval
from runtime.evaluate.metrics import calibration_error
from runtime.evaluate.report.markup import Markup, join, tag
from runtime.evaluate.report.plot import STYLES, Frame, marker, percent, picture, series, ticks

__all__ = ["Bar", "Line", "Point", "bars", "epsilon", "front", "lines", "pareto", "reliability"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of a chart."""

    place: int
    """The model's."""
    label: str
    points: tuple[tuple[float, float], ...]
    control: bool = False
    """Dashed and gray: what the others are held against."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A bar of one model."""

    place: int
    label: str
    value: float
    """A share."""
    interval: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A model in a plane."""

    place: int
    label: str
    x: float
    y: float
    interval: Interval | None = None
    """Of y."""


def lines(title: str, content: Sequence[Line], top: float, x_title: str, y_title: str, small: bool = False) -> Markup:
    """Error over severity, from 0 to `top`."""
    size = {"width": 176.0, "height": 132.0, "left": 38.0, "bottom": 20.0, "right": 8.0} if small else {}
    frame = Frame(x=(0.8, 5.2), y=(0, top), **size)
    told = "; ".join(
        f"{line.label}: {', '.join(f'{x:g}: {y:.1%}' for x, y in line.points)}" for line in content if line.points
    )
    drawn = [series(frame, line.points, line.place, line.control) for line in reversed(content) if line.points]
    axes = frame.axes(
        [1, 2, 3, 4, 5],
        ticks(0, top, 2 if small else 5),
        x_title="" if small else x_title,
        y_title="" if small else y_title,
        y_form=percent,
    )
    return picture(frame, title, f"{y_title} by {x_title}. {told}", axes, *drawn)


def bars(title: str, rows: Mapping[str, Sequence[Bar]], top: float) -> Markup:
    """Horizontal bars with intervals, a group a corruption, from 0 to `top`."""
    thick, gap, head = 9.0, 3.0, 17.0
    height = sum(head + len(row) * (thick + gap) + 6 for row in rows.values()) + 22
    frame = Frame(x=(0, top), y=(0, 1), height=height, left=12, right=44, top=4, bottom=20)
    parts, y, told = [], 4.0, []
    for value in ticks(0, top, 4):
        x = frame.px(value)
        parts.append(tag("line", x1=x, x2=x, y1=4, y2=height - 20, class_="grid"))
        parts.append(tag("text", percent(value), x=x, y=height - 6, class_="tick", text_anchor="middle"))
    for name, row in rows.items():
        parts.append(tag("text", name, x=frame.left, y=y + 12, class_="label"))
        y += head
        for bar in row:
            parts.append(_bar(frame, bar, y, thick))
            y += thick + gap
        y += 6
        told.append(f"{name}: {', '.join(f'{bar.label} {bar.value:.1%}' for bar in row)}")
    return picture(frame, title, "; ".join(told), *parts)


def _bar(frame: Frame, bar: Bar, y: float, thick: float) -> Markup:
    start, end, middle = frame.px(0), frame.px(bar.value), y + thick / 2
    style = bar.place % STYLES
    parts = [tag("rect", x=start, y=y, width=max(0.5, end - start), height=thick, class_=f"bar s{style}", rx=1.5)]
    reach = end
    if bar.interval:
        low, high = (frame.px(min(max(value, 0), frame.x[1])) for value in bar.interval)
        reach = max(end, high)
        stop = f"{y + 1:.1f}v{thick - 2:g}"
        path = f"M{low:.1f} {middle:.1f}H{high:.1f}M{low:.1f} {stop}M{high:.1f} {stop}"
        parts.append(tag("path", d=path, class_="whisker"))
    parts.append(tag("text", f"{100 * bar.value:.1f}", x=reach + 5, y=y + thick - 0.8, class_="number"))
    return join(*parts)


def reliability(title: str, counts: Counts, place: int) -> Markup:
    """Accuracy over confidence in fifteen bins, with the share of images in each below."""
    frame = Frame(x=(0, 1), y=(0, 1), width=312, height=300, bottom=72, right=22)
    parts = [frame.axes((), (0, 0.25, 0.5, 0.75, 1), y_title="accuracy", y_form=percent)]
    floor, most, told = frame.py(0), max(counts.bin_images) or 1, []
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
        share = 26 * images / most
        parts.append(tag("rect", **box, y=frame.height - 36 - share + 14, height=share, class_="share"))
        told.append(f"{confidence:.0%} sure, {accuracy:.0%} right ({images} images)")
    parts.append(tag("path", d=f"M{frame.px(0)} {floor:.1f}L{frame.px(1)} {frame.py(1):.1f}", class_="ideal"))
    base = frame.height - 22
    parts.append(tag("line", x1=frame.px(0), x2=frame.px(1), y1=base, y2=base, class_="axis"))
    parts += [
        tag("text", percent(value), x=frame.px(value), y=base + 12, class_="tick", text_anchor="middle")
        for value in (0, 0.25, 0.5, 0.75, 1)
    ]
    parts.append(tag("text", "images", x=frame.left - 5, y=base - 8, class_="tick", text_anchor="end"))
    ece = f"expected calibration error {calibration_error(counts):.3f}"
    return picture(frame, title, f"{ece}. {'; '.join(told)}", *parts)


def front(points: Sequence[Point], more_is_better: bool) -> list[Point]:
    """The points that no other beats: none is as fast or faster and better, or as good and faster."""
    sign = -1 if more_is_better else 1
    best, found = float("inf"), []
    for point in sorted(points, key=lambda point: (point.x, sign * point.y)):
        if sign * point.y < best:
            best = sign * point.y
            found.append(point)
    return found


def pareto(title: str, points: Sequence[Point], y_title: str, more_is_better: bool, share: bool = True) -> Markup:
    """Models by latency, with a line through those that no other beats."""
    ends = [end for point in points for end in (point.y, *(point.interval or ()))]
    low, high = min(ends), max(ends)
    space = max(0.08 * (high - low), 0.01 if share else 1)
    frame = Frame(
        x=(0, 1.12 * max(point.x for point in points)), y=(max(-space / 2, low - space), high + space), height=270
    )
    y_form = (lambda value: f"{100 * value:.3g}%") if share else "{:g}".format
    parts = [
        frame.axes(
            ticks(*frame.x),
            ticks(max(0, frame.y[0]), frame.y[1]),
            "p50 latency, ms (left is better)",
            y_title,
            "{:g}".format,
            y_form,
        )
    ]
    best = front(points, more_is_better)
    path = "L".join(f"{frame.px(point.x):.1f} {frame.py(point.y):.1f}" for point in best)
    parts.append(tag("path", d=f"M{path}", class_="front"))
    for point in points:
        x = frame.px(point.x)
        if point.interval:
            low_y, high_y = (frame.py(end) for end in point.interval)
            parts.append(tag("path", d=f"M{x:.1f} {low_y:.1f}V{high_y:.1f}", class_="whisker"))
        parts.append(marker(point.place, x, frame.py(point.y), 5))
    parts.append(_names(frame, points))
    form = "{:.1%}" if share else "{:.1f}"
    told = "; ".join(f"{point.label}: {point.x:g} ms, {form.format(point.y)}" for point in points)
    beaten = ", ".join(point.label for point in best)
    return picture(frame, title, f"{told}. Not beaten by another: {beaten}", *parts)


def _names(frame: Frame, points: Sequence[Point]) -> Markup:
    """Labels beside their points, pushed apart where they would lie on each other."""
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


def epsilon(title: str, content: Sequence[Line]) -> Markup:
    """Accuracy over the size of the change, in 255ths."""
    most = max(x for line in content for x, _ in line.points)
    frame = Frame(x=(0, most or 1), y=(0, 1), right=20)
    told = "; ".join(f"{line.label}: {', '.join(f'{x:g}/255: {y:.1%}' for x, y in line.points)}" for line in content)
    axes = frame.axes(
        ticks(0, most, 5), (0, 0.25, 0.5, 0.75, 1), "ε, 255ths of the pixels' range", "top-1", y_form=percent
    )
    drawn = [series(frame, line.points, line.place, line.control) for line in content]
    return picture(frame, title, told, axes, *drawn)
