"""Pictures of a calibration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from calib.thresholds import percentile
from runtime.system.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from calib.ptq import Calibrated
    from calib.sensitivity import Fallback

__all__ = ["plot_fallback", "plot_ranges"]


def plot_ranges(calibrated: Calibrated, path: Path) -> None:
    """Draws the range of every quantized activation and the threshold it got, in the order of the layers."""
    from matplotlib.figure import Figure

    names = list(calibrated.histograms)
    places = range(len(names))
    figure = Figure(figsize=(max(7, 0.13 * len(names)), 4.5), layout="constrained")
    axes = figure.add_subplot()
    largest = [calibrated.histograms[name].amax for name in names]
    most = [percentile(calibrated.histograms[name], 99.99) for name in names]
    axes.vlines(places, most, largest, color="0.75", linewidth=3, label="99.99 % to the largest")
    axes.plot(places, largest, "_", color="0.4", label="largest magnitude")
    axes.plot(places, [calibrated.thresholds[name] for name in names], "o", markersize=3, label="threshold (127)")
    axes.set(yscale="log", xlabel="quantized activation, from input to output", ylabel="magnitude")
    axes.legend(frameon=False)
    _save(figure, path)


def plot_fallback(fallback: Fallback, path: Path) -> None:
    """Draws every choice of layers that was measured: points of top-1 lost against the share of MACs in INT8."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for kind in fallback.chosen.losses:
        trials = sorted(fallback.trials, key=lambda trial: trial.int8_share)
        shares = [100 * trial.int8_share for trial in trials]
        axes.plot(shares, [100 * trial.losses[kind] for trial in trials], "o-", markersize=4, label=kind)
    axes.axhline(100 * fallback.budget, color="0.4", linestyle="--", label="budget")
    axes.plot([100 * fallback.chosen.int8_share], [100 * fallback.chosen.loss], "*", markersize=14, label="taken")
    axes.set(xlabel="MACs in INT8, %", ylabel="expected loss of top-1, points")
    axes.legend(frameon=False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
