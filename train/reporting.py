"""What a run tells people while it goes: a progress bar, a line an epoch, metrics.csv."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from runtime.system.files import write_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = [
    "EpochMetrics",
    "Reporter",
    "RichReporter",
    "SilentReporter",
    "best_epoch",
    "duration",
    "read_metrics",
    "summary_table",
    "write_metrics",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochMetrics:
    """One epoch's line in metrics.csv."""

    epoch: int
    """Finished epochs, from 1."""
    step: int
    """Parameter updates since the start."""
    lr: float
    """Learning rate of the last update."""
    loss: float
    """Mean of the summed training loss."""
    top1: float
    """Clean validation accuracy through the main BN, in [0, 1]."""
    top1_attacked: float
    """The same under untargeted PGD-5 at the training ε, white-box on the main route."""
    images_per_s: float
    """Clean training images a second, loading included."""
    seconds: float
    """Training time of the epoch, without evaluation."""


def write_metrics(path: Path, rows: list[EpochMetrics]) -> None:
    """Writes all epochs so far, atomically. Raises OutputError."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [item.name for item in fields(EpochMetrics)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_text(path, text.getvalue())


def read_metrics(rows: list[dict[str, Any]]) -> list[EpochMetrics]:
    """Turns the rows a checkpoint carries back into metrics."""
    return [EpochMetrics(**row) for row in rows]


def best_epoch(rows: Sequence[EpochMetrics]) -> EpochMetrics:
    """Returns the first epoch with the best clean accuracy."""
    return max(rows, key=lambda row: row.top1)


def summary_table(arch: str, recipe: str, rows: Sequence[EpochMetrics]) -> Table:
    """Returns what a finished run came to, its best and its last epoch side by side."""
    from rich.table import Table

    best, last = best_epoch(rows), rows[-1]
    table = Table(f"{arch}, {recipe}", f"best: epoch {best.epoch}", f"last: epoch {last.epoch}", title_justify="left")
    for name, form in (("top1", "{:.1%}"), ("top1_attacked", "{:.1%}"), ("loss", "{:.3f}"), ("images_per_s", "{:.0f}")):
        table.add_row(_IN_WORDS[name], *(form.format(getattr(row, name)) for row in (best, last)))
    table.add_row("training time", "", duration(sum(row.seconds for row in rows)))
    return table


_IN_WORDS = {
    "top1": "clean accuracy",
    "top1_attacked": "accuracy under attack",
    "loss": "training loss",
    "images_per_s": "images a second",
}


class Reporter(Protocol):
    """Receives a run's progress. `fit` calls it; it never calls back."""

    def epoch_started(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """Epoch `epoch` (from 1) of `epochs` starts at step `done` of `steps`."""

    def stepped(self, loss: float | None) -> None:
        """One training step is done; `loss` where it is known without waiting for the GPU."""

    def evaluating(self) -> None:
        """Training of the epoch is done, evaluation starts."""

    def epoch_ended(self, metrics: EpochMetrics, epochs: int, seconds_left: float) -> None:
        """The epoch is done and saved."""

    def close(self) -> None:
        """The run ended, one way or the other."""


class SilentReporter:
    """Says nothing: the default in Python."""

    def epoch_started(self, epoch: int, epochs: int, steps: int, done: int) -> None: ...

    def stepped(self, loss: float | None) -> None: ...

    def evaluating(self) -> None: ...

    def epoch_ended(self, metrics: EpochMetrics, epochs: int, seconds_left: float) -> None: ...

    def close(self) -> None: ...


class RichReporter:
    """A progress bar and a line an epoch; in a log file, a line each half minute instead of the bar."""

    _LOG_EVERY_S = 30.0

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
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
        if not self._console.is_terminal and time.monotonic() - self._logged > self._LOG_EVERY_S:
            self._logged = time.monotonic()
            task = self._bar.tasks[0]
            left = "" if task.time_remaining is None else f"  {duration(task.time_remaining)} left in the epoch"
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
            f"{metrics.images_per_s:.0f} images/s  {duration(seconds_left)} left",
            highlight=False,
        )

    def close(self) -> None:
        self._bar.stop()


def duration(seconds: float) -> str:
    """Returns a time as people write it: 1h05m, 3m07s, 9s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
