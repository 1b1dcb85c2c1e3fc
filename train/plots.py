"""`curves.png`: a run at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runtime.system.files import atomic_write
from train.reporting import EpochMetrics

__all__ = ["plot_curves"]


def plot_curves(path: Path, rows: Sequence[EpochMetrics], title: str) -> None:
    """Draws loss, accuracy and learning rate by epoch, as a PNG of 1200 × 400 pixels.

    Raises:
        OutputError: `path` cannot be written.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state
    from matplotlib.ticker import MaxNLocator

    epochs = [row.epoch for row in rows]
    marker = "o" if len(rows) < 30 else ""
    figure = Figure(figsize=(12, 4), dpi=100, layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    loss.plot(epochs, [row.loss for row in rows], marker=marker, label="sum of the branches")
    loss.set(title="training loss", xlabel="epoch")
    accuracy.plot(epochs, [100 * row.top1 for row in rows], marker=marker, label="clean")
    accuracy.plot(epochs, [100 * row.top1_attacked for row in rows], marker=marker, label="under attack (PGD-5)")
    accuracy.set(title="validation accuracy, main BN, %", xlabel="epoch", ylim=(0, 100))
    rate.plot(epochs, [row.lr for row in rows], marker=marker, label="at the epoch's end")
    rate.set(title="learning rate", xlabel="epoch")
    for axes in (loss, accuracy, rate):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
