"""The picture of a report: recipes by accuracy and corruption error, and the gain by data size."""

from __future__ import annotations

import io
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.fidelity.plan import TUNED
from benchmarks.fidelity.results import Results, paired
from runtime.system.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]


def draw(results: Results, path: Path) -> bool:
    """Draw the finished runs as SVG; return whether there are any."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    if not results.recipes():
        return False
    panels = [_draw_recipes, _draw_sizes] if results.plan.sizes else [_draw_recipes]
    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes, results)
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "fidelity", "svg.fonttype": "path"}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    write_bytes(path, content.getvalue())
    return True


def _draw_recipes(axes: Axes, results: Results) -> None:
    for recipe in results.recipes():
        values = [list(results.values(recipe, metric).values()) for metric in ("clean accuracy", "corruption error")]
        x, y = map(statistics.mean, values)
        deviations = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
        axes.errorbar(x, y, xerr=deviations[0], yerr=deviations[1], fmt="o", capsize=3, label=recipe)
    axes.set_xlabel("clean accuracy, %")
    axes.set_ylabel("mean corruption error, %")
    axes.set_title(f"{results.plan.images:,} training images, mean ± standard deviation over seeds", fontsize=10)
    axes.margins(0.1)
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)


def _draw_sizes(axes: Axes, results: Results) -> None:
    sizes = sorted({results.plan.images, *(images for images, _ in results.plan.sizes)})
    for metric, sign in (("clean accuracy", 1), ("corruption error", -1)):
        points = []
        for images in sizes:
            values = [results.values(recipe, metric, images=images) for recipe in TUNED]
            if (found := paired(values[1], values[0])) is not None:
                points.append((images, sign * found.mean, found.half or 0.0))
        if points:
            x, y, halves = zip(*points, strict=True)
            label = "clean accuracy" if sign > 0 else "reduction of the corruption error"
            axes.errorbar(x, y, yerr=halves, fmt="o-", capsize=3, label=label)
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{images:,}" for images in sizes])
    axes.minorticks_off()
    axes.set_xlabel("training images")
    axes.set_ylabel("gain of AdvProp over vanilla, points")
    axes.set_title("Gain by data size; bars: 95 % interval if there are several seeds", fontsize=10)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=9)
    axes.grid(alpha=0.3)
