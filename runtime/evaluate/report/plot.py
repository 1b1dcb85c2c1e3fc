"""The parts of a picture: axes, ticks, markers, lines. Colors are classes, which the page's style fills in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.evaluate.report.markup import Markup, join, tag

__all__ = ["STYLES", "Frame", "marker", "percent", "picture", "series", "swatch", "ticks"]

STYLES = 6
"""Colors and markers; a seventh model has the first's, with a dashed line."""

_DASHES = ("", "6 3", "2 3", "8 3 2 3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Where data is drawn, in pixels of the picture."""

    x: tuple[float, float]
    """The data's range."""
    y: tuple[float, float]
    width: float = 340
    height: float = 240
    left: float = 50
    right: float = 12
    top: float = 10
    bottom: float = 40

    def px(self, value: float) -> float:
        """The place of a value along x."""
        low, high = self.x
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def py(self, value: float) -> float:
        """The place of a value along y, which grows upwards."""
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
        """Grid lines, numbers and titles."""
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


def picture(frame: Frame, title: str, description: str, *content: Markup) -> Markup:
    """An SVG with its text alternative."""
    return tag(
        "svg",
        tag("title", title),
        tag("desc", description),
        *content,
        viewBox=f"0 0 {frame.width:g} {frame.height:g}",
        role="img",
        aria_label=f"{title}. {description}",
    )


def series(frame: Frame, points: Sequence[tuple[float, float]], place: int, control: bool = False) -> Markup:
    """A line through points with a marker at each; `control`: dashed and gray."""
    path = "M" + "L".join(f"{frame.px(x):.1f} {frame.py(y):.1f}" for x, y in points)
    marks = (marker(place, frame.px(x), frame.py(y), control=control) for x, y in points)
    return join(_line(path, place, control), *marks)


def _line(path: str, place: int, control: bool) -> Markup:
    dash = "4 3" if control else _DASHES[place // STYLES % len(_DASHES)]
    return tag("path", d=path, class_=f"line {_style(place, control)}", stroke_dasharray=dash or None)


def _style(place: int, control: bool) -> str:
    return "control" if control else f"s{place % STYLES}"


def marker(place: int, x: float, y: float, size: float = 3.6, control: bool = False) -> Markup:
    """A model's mark: another form for each color, so that no one needs to see the color."""
    style = f"mark {_style(place, control)}"
    form = place % STYLES
    if form == 0:
        return tag("circle", cx=x, cy=y, r=size, class_=style)
    r = size * 1.15
    if form == 1:
        corners = [(-r, -r), (r, -r), (r, r), (-r, r)]
    elif form == 2:
        corners = [(0, -r * 1.3), (r * 1.2, r), (-r * 1.2, r)]
    elif form == 3:
        corners = [(0, -r * 1.4), (r * 1.4, 0), (0, r * 1.4), (-r * 1.4, 0)]
    elif form == 4:
        corners = [(0, r * 1.3), (r * 1.2, -r), (-r * 1.2, -r)]
    else:
        t = r / 2.2
        corners = [(-t, -r), (t, -r), (t, -t), (r, -t), (r, t), (t, t), (t, r), (-t, r), (-t, t), (-r, t), (-r, -t)]
        corners.append((-t, -t))
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return tag("polygon", points=points, class_=style)


def swatch(place: int, control: bool = False) -> Markup:
    """The sign of a line in a legend."""
    line = _line("M1 8L27 8", place, control)
    return tag(
        "svg", line, marker(place, 14, 8, control=control), viewBox="0 0 28 16", class_="swatch", aria_hidden="true"
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two, about `count` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def percent(value: float) -> str:
    """A share as percent, for ticks."""
    return f"{100 * value:g}%"
