"""Report a calibration: the record `NAME.json`, a table for the console, and plots."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.thresholds import percentile
from runtime.system.files import atomic_write, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

    from calib.config import CalibrationConfig
    from calib.pipeline import CalibratedFile
    from calib.ptq import Calibrated
    from calib.sensitivity import Fallback

__all__ = ["plot_fallback", "plot_ranges", "print_calibration", "save_record"]

FORMAT = "advprop.int8/1"


def save_record(path: Path, result: CalibratedFile, config: CalibrationConfig) -> None:
    """Write the record: the settings, and the precision, threshold and error of each layer.

    Raises:
        OutputError: the file cannot be written.
    """
    calibrated = result.calibrated
    content = {
        "format": FORMAT,
        "config": {name: value for name, value in dataclasses.asdict(config).items() if name != "images"},
        "int8_share_of_macs": calibrated.int8_share,
        "agreement": result.agreement,
        "compared_images": result.parity_images,
        "equalized": calibrated.equalized,
        "budget": _budget_record(calibrated.fallback) if calibrated.fallback else None,
        "nodes": _node_records(calibrated),
    }
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _budget_record(fallback: Fallback) -> dict[str, Any]:
    return {
        "budget": fallback.budget,
        "met": fallback.met,
        "losses": fallback.chosen.losses,
        "agreement": fallback.chosen.agreement,
        "given_back": list(fallback.chosen.floating),
        "sensitivity": {  # JSON cannot represent inf
            node: value if math.isfinite(value) else None for node, value in fallback.sensitivity.items()
        },
        "trials": [
            {"given_back": len(trial.floating), "int8_share_of_macs": trial.int8_share, "losses": trial.losses}
            for trial in fallback.trials
        ],
    }


def _node_records(calibrated: Calibrated) -> list[dict[str, Any]]:
    layers = {layer.node: layer for layer in calibrated.layers}
    return [
        dataclasses.asdict(point)
        | {
            "threshold": calibrated.thresholds.get(point.tensor) if point.int8 else None,
            "largest": calibrated.histograms[point.tensor].amax if point.int8 else None,
            "noise": layers[point.node].noise if point.node in layers else None,
        }
        for point in calibrated.points
    ]


def print_calibration(console: Console, source: str, target: Path, result: CalibratedFile) -> None:
    """Print the precision and the error of each layer, and a summary.

    Args:
        console: console to print to.
        source: name of the float32 file.
        target: the INT8 file.
        result: result of `calibrate_file`.
    """
    from rich.table import Table

    calibrated = result.calibrated
    noise = {layer.node: f"{layer.noise:.1e}" for layer in calibrated.layers}
    total = max(sum(point.macs for point in calibrated.points), 1)
    table = Table(box=None)
    for heading in ("layer", "operator", "MACs", "precision", "noise", "reason"):
        table.add_column(heading, justify="right" if heading in ("MACs", "noise") else "left", overflow="fold")
    for point in calibrated.points:
        share, precision = f"{point.macs / total:.1%}", "INT8" if point.int8 else "float"
        reason = "" if point.int8 else point.reason
        table.add_row(point.node, point.op, share, precision, noise.get(point.node, ""), reason)
    console.print(table)
    counts = Counter(point.int8 for point in calibrated.points)
    lines = [
        f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB): {counts[True]} of {counts.total()} layers in INT8, "
        f"{calibrated.int8_share:.1%} of the MACs; top-1 agreement with {source} on {result.parity_images} images "
        f"{result.agreement:.1%}"
    ]
    fallback = calibrated.fallback
    if fallback:
        losses = ", ".join(f"{100 * loss:.2f} ({kind})" for kind, loss in fallback.chosen.losses.items())
        verdict = "met" if fallback.met else "NOT met"
        lines.append(
            f"budget of {100 * fallback.budget:.2f} points {verdict}: expected loss {losses} on "
            f"{len(result.images.held)} held-out images; {len(fallback.chosen.floating)} layers kept in floating point"
        )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def plot_ranges(calibrated: Calibrated, path: Path) -> None:
    """Plot the range and the threshold of each quantized activation, in graph order."""
    from matplotlib.figure import Figure

    names = list(calibrated.histograms)
    places = range(len(names))
    figure = Figure(figsize=(max(7, 0.13 * len(names)), 4.5), layout="constrained")
    axes = figure.add_subplot()
    largest = [calibrated.histograms[name].amax for name in names]
    typical = [percentile(calibrated.histograms[name], 99.99) for name in names]
    axes.vlines(places, typical, largest, color="0.75", linewidth=3, label="99.99th percentile to largest magnitude")
    axes.plot(places, largest, "_", color="0.4", label="largest magnitude")
    axes.plot(places, [calibrated.thresholds[name] for name in names], "o", markersize=3, label="clipping threshold")
    axes.set(yscale="log", xlabel="quantized activation, from input to output", ylabel="magnitude")
    axes.legend(frameon=False)
    _save_figure(figure, path)


def plot_fallback(fallback: Fallback, path: Path) -> None:
    """Plot the loss of top-1 accuracy of each measured choice against its INT8 share."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for kind in fallback.chosen.losses:
        trials = sorted(fallback.trials, key=lambda trial: trial.int8_share)
        shares = [100 * trial.int8_share for trial in trials]
        axes.plot(shares, [100 * trial.losses[kind] for trial in trials], "o-", markersize=4, label=kind)
    axes.axhline(100 * fallback.budget, color="0.4", linestyle="--", label="budget")
    axes.plot([100 * fallback.chosen.int8_share], [100 * fallback.chosen.loss], "*", markersize=14, label="chosen")
    axes.set(xlabel="MACs in INT8, %", ylabel="expected loss of top-1 accuracy, percentage points")
    axes.legend(frameon=False)
    _save_figure(figure, path)


def _save_figure(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
