"""Report a run: progress bar, epoch lines, `metrics.csv`, `curves.png` and final table."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from runtime.system.files import atomic_write, write_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = [
    "EpochMetrics",
    "Reporter",
    "RichReporter",
    "SilentReporter",
    "best_epoch",
    "format_duration",
    "plot_curves",
    "summary_table",
    "write_metrics",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochMetrics:
    """Metrics of one epoch: a row of metrics.csv."""

    epoch: int
    """Number of the epoch, from 1."""
    step: int
    """Parameter updates since the start of the run."""
    lr: float
    """Learning rate of the last update."""
    loss: float
    """Mean training loss, summed over the branches of the recipe."""
    branch_losses: dict[str, float] = field(default_factory=dict)
    """Mean training loss of each branch, by its name. Earlier versions did not store it."""
    val_loss: float | None = None
    """Mean cross-entropy on the validation images through the main BN, without label smoothing.
    Earlier versions did not store it."""
    top1: float
    """Clean validation accuracy through the main BN, in [0, 1]."""
    top1_attacked: float
    """Validation accuracy under untargeted PGD-5 at the training ε, white-box on the main route."""
    images_per_s: float
    """Clean training images per second, including data loading."""
    seconds: float
    """Training time of the epoch, without validation."""


def best_epoch(rows: Sequence[EpochMetrics]) -> EpochMetrics:
    """Return the first epoch with the best clean accuracy."""
    return max(rows, key=lambda row: row.top1)


def write_metrics(path: Path, rows: Sequence[EpochMetrics]) -> None:
    """Write one CSV row per epoch, atomically. Numbers have six significant digits.

    Raises:
        OutputError: `path` cannot be written.
    """
    branches = list(dict.fromkeys(f"loss_{name}" for row in rows for name in row.branch_losses))
    columns = [item.name for item in fields(EpochMetrics)]
    place = columns.index("branch_losses")
    columns[place : place + 1] = branches
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = asdict(row) | {f"loss_{name}": value for name, value in row.branch_losses.items()}
        del values["branch_losses"]
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in values.items()})
    write_text(path, text.getvalue())


def plot_curves(path: Path, rows: Sequence[EpochMetrics], title: str) -> None:
    """Plot loss, accuracy and learning rate by epoch into a PNG of 1200 × 400 pixels.

    Raises:
        OutputError: `path` cannot be written.
    """
    from matplotlib.figure import Figure  # pyplot would need a display and keeps global state
    from matplotlib.ticker import MaxNLocator

    epochs = [row.epoch for row in rows]
    marker = "o" if len(rows) < 30 else ""
    figure = Figure(figsize=(12, 4), dpi=100, layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    loss.plot(epochs, [row.loss for row in rows], marker=marker, label="training, sum of the branches")
    names = list(dict.fromkeys(name for row in rows for name in row.branch_losses))
    curves = {f"training, {name}": [row.branch_losses.get(name, math.nan) for row in rows] for name in names[:8]}
    if len(names) == 1:  # the sum already shows it
        curves = {}
    curves["validation, clean"] = [math.nan if row.val_loss is None else row.val_loss for row in rows]
    for label, values in curves.items():
        if not all(map(math.isnan, values)):
            style = "--" if label.startswith("validation") else ":"
            loss.plot(epochs, values, marker=marker, linestyle=style, label=label)
    loss.set(title="loss", xlabel="epoch")
    accuracy.plot(epochs, [100 * row.top1 for row in rows], marker=marker, label="clean")
    accuracy.plot(epochs, [100 * row.top1_attacked for row in rows], marker=marker, label="under attack (PGD-5)")
    accuracy.set(title="validation accuracy, main BN, %", xlabel="epoch", ylim=(0, 100))
    rate.plot(epochs, [row.lr for row in rows], marker=marker, label="end of the epoch")
    rate.set(title="learning rate", xlabel="epoch")
    for axes in (loss, accuracy, rate):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def summary_table(title: str, best: EpochMetrics, rows: Sequence[EpochMetrics]) -> Table:
    """Return a table with the metrics of a finished run.

    Args:
        title: heading of the first column.
        best: the epoch that best.pt holds.
        rows: all epochs.
    """
    from rich.markup import escape
    from rich.table import Table

    last = rows[-1]
    table = Table(escape(title), f"best: epoch {best.epoch}", f"last: epoch {last.epoch}", title_justify="left")
    for label, name, form in (
        ("clean accuracy", "top1", "{:.1%}"),
        ("accuracy under attack", "top1_attacked", "{:.1%}"),
        ("training loss", "loss", "{:.3f}"),
        ("validation loss", "val_loss", "{:.3f}"),
        ("images per second", "images_per_s", "{:.0f}"),
    ):
        values = [getattr(row, name) for row in (best, last)]
        table.add_row(label, *("" if value is None else form.format(value) for value in values))
    table.add_row("training time", "", format_duration(sum(row.seconds for row in rows)))
    return table


class Reporter(Protocol):
    """Receives the progress of a run from `fit`."""

    def epoch_started(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """Epoch `epoch` (from 1) of `epochs` starts; `done` of its `steps` are already finished."""

    def stepped(self, loss: float | None) -> None:
        """A training step is finished; `loss` is None if reading it would wait for the GPU."""

    def evaluating(self) -> None:
        """The training steps of the epoch are finished and validation starts."""

    def epoch_ended(self, metrics: EpochMetrics, epochs: int, seconds_left: float) -> None:
        """The epoch is finished and saved; the run takes about `seconds_left` more seconds."""

    def close(self) -> None:
        """The run ended, with or without an error."""


class SilentReporter:
    """Reports nothing. `fit` uses it by default."""

    def epoch_started(self, epoch: int, epochs: int, steps: int, done: int) -> None: ...

    def stepped(self, loss: float | None) -> None: ...

    def evaluating(self) -> None: ...

    def epoch_ended(self, metrics: EpochMetrics, epochs: int, seconds_left: float) -> None: ...

    def close(self) -> None: ...


class RichReporter:
    """Shows a progress bar and prints a line per epoch.

    If the output is not a terminal, a line every 30 seconds replaces the bar.
    """

    _LOG_INTERVAL_S = 30.0

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=None, note="")
        self._logged = time.monotonic()
        if console.is_terminal:
            self._bar.start()

    def epoch_started(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        self._bar.reset(self._task, total=steps, completed=done, description=f"epoch {epoch}/{epochs}", note="")

    def stepped(self, loss: float | None) -> None:
        note = {} if loss is None else {"note": f"loss {loss:.3f}"}
        self._bar.update(self._task, advance=1, **note)  # type: ignore[arg-type]
        if not self._console.is_terminal and time.monotonic() - self._logged > self._LOG_INTERVAL_S:
            self._logged = time.monotonic()
            task = self._bar.tasks[0]
            remaining = task.time_remaining
            left = "" if remaining is None else f"  {format_duration(remaining)} left in this epoch"
            self._console.print(
                f"{task.description}  step {task.completed:.0f}/{task.total:.0f}  {task.fields['note']}{left}",
                highlight=False,
            )

    def evaluating(self) -> None:
        self._bar.update(self._task, note="evaluating")

    def epoch_ended(self, metrics: EpochMetrics, epochs: int, seconds_left: float) -> None:
        self._console.print(
            f"epoch {metrics.epoch}/{epochs}  loss {metrics.loss:.3f}  "
            f"clean {metrics.top1:.1%}  under attack {metrics.top1_attacked:.1%}  "
            f"{metrics.images_per_s:.0f} images/s  {format_duration(seconds_left)} left",
            highlight=False,
        )

    def close(self) -> None:
        self._bar.stop()


def format_duration(seconds: float) -> str:
    """Format a duration as 1h05m, 3m07s or 9s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
