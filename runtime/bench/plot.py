"""The plot of throughput against latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.system.colors import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["pareto_front", "place_labels", "plot_run"]

_MARKERS = "os^Dv*"
_LINES = ("-", "--", ":")
_COLORS = 6
_FONT = 8  # points
_AROUND = ((0, 9), (0, -9), (1, 0), (-1, 0), (1, 9), (-1, 9), (1, -9), (-1, -9), (0, 18), (0, -18), (0, 27), (0, -27))
"""Positions of a label relative to its marker, in order of preference: sides, in label widths, and
points upward."""


def plot_run(path: Path, result: Mapping[str, Any]) -> None:
    """Plot throughput against p50 latency, one line per model, each point with its batch size.

    With several numbers of callers, the line connects the points of the model's Pareto front.

    Args:
        path: `.png` or `.svg`; the image has 1600 × 1000 pixels.
        result: `advprop.benchrun/1` with at least one point.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(8, 5), dpi=200, layout="constrained", facecolor=LIGHT["page"])
    axes = figure.subplots()
    several = len(result["settings"]["concurrency"]) > 1
    points = [
        (place, point["quantities"]["end_to_end"]["p50_ms"], point["images_s"], _label(point, several))
        for place, model in enumerate(result["models"])
        for point in result["points"]
        if point["model"] == model["name"]
    ]
    for place, model in enumerate(result["models"]):
        own = [(x, y) for other, x, y, _ in points if other == place]
        _line(axes, place, str(model["name"]), own, several)
    _style(axes, result)
    figure.legend(loc="outside lower left", frameon=False, fontsize=9, ncols=3)
    figure.draw_without_rendering()  # determines the positions of the points
    pixels = axes.transData.transform([(x, y) for _, x, y, _ in points]) * 72 / figure.dpi
    labels = [label for *_, label in points]
    for (place, x, y, label), offset in zip(points, place_labels(pixels.tolist(), labels), strict=True):
        axes.annotate(
            label,
            (x, y),
            xytext=offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=_FONT,
            color=LIGHT[f"s{place % _COLORS}"],
        )
    # Without the time of writing, equal runs produce equal files.
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})


def place_labels(points: Sequence[Sequence[float]], labels: Sequence[str]) -> list[tuple[float, float]]:
    """Place a label next to each point, without overlap if possible.

    Args:
        points: (x, y) in typographic points.
        labels: texts of the labels.

    Returns:
        Offset of each label's center from its point.
    """
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    offsets = []
    for (x, y), label in zip(points, labels, strict=True):
        width, height = 0.58 * _FONT * len(label), 1.1 * _FONT
        choices = []
        for rank, (side, up) in enumerate(_AROUND):
            right = side * (width / 2 + 6)
            box = (x + right - width / 2, y + up - height / 2, x + right + width / 2, y + up + height / 2)
            choices.append((sum(_overlap(box, other) for other in taken), rank, (right, float(up)), box))
        _, _, offset, box = min(choices)
        taken.append(box)
        offsets.append(offset)
    return offsets


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return max(wide, 0.0) * max(high, 0.0)


def _label(point: Mapping[str, Any], several: bool) -> str:
    return f"{point['batch_size']}×{point['concurrency']}" if several else str(point["batch_size"])


def _line(axes: Axes, place: int, name: str, points: Sequence[tuple[float, float]], several: bool) -> None:
    if not points:
        return
    style: dict[str, Any] = {
        "color": LIGHT[f"s{place % _COLORS}"],
        "marker": _MARKERS[place % len(_MARKERS)],
        "markersize": 6,
    }
    joined = pareto_front(points) if several else list(points)
    dashes = _LINES[place // _COLORS % len(_LINES)]
    axes.plot(*zip(*joined, strict=True), **style, linestyle=dashes, linewidth=1.4, label=name)
    rest = [point for point in points if point not in joined]
    if rest:
        axes.plot(*zip(*rest, strict=True), **style, linestyle="none", alpha=0.5)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (latency, throughput) that no other point dominates, by latency."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best


def _style(axes: Axes, result: Mapping[str, Any]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(0.08, 0.12)
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        # A range of less than a decade and a half has too few powers of ten for ticks.
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 30 * low else (1, 2, 5), numticks=20))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    several = len(result["settings"]["concurrency"]) > 1
    axes.set_xlabel("end-to-end latency, p50 per batch, ms (left is better)")
    axes.set_ylabel("throughput, images/s (up is better)")
    machine = result["machine"]
    on_gpu = any(model["device"] == "cuda" for model in result["models"])
    device = machine["gpu"] if on_gpu else f"{machine['cpu'] or 'unknown CPU'}, {machine['cores']} cores"
    named = "batch size × callers; lines connect the Pareto front of each model" if several else "batch size"
    axes.set_title(f"{device}\npoints: {named}", fontsize=9, color=LIGHT["ink"], loc="left")
    axes.grid(color=LIGHT["rule"], linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
