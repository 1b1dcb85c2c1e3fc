"""Where a run's figures go besides metrics.csv: TensorBoard, and Weights & Biases where asked."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from runtime.errors import ConfigError, first_line
from train.config import TrainConfig
from train.config_file import flat, to_mapping
from train.reporting import EpochMetrics

__all__ = ["TensorBoardTracker", "Tracker", "WandbTracker", "epoch_values", "open_trackers"]

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Keeps figures over time. A resumed run goes on where it stopped."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Keeps named values of update `step`."""

    def close(self) -> None:
        """Writes what is left."""


class TensorBoardTracker:
    """Event files for `tensorboard --logdir runs`."""

    def __init__(self, folder: Path, step: int) -> None:
        """`step`: updates done so far; later values that an aborted run left are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        with self._full_disk_told():
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        with self._full_disk_told():
            self._writer.close()

    @contextmanager
    def _full_disk_told(self) -> Iterator[None]:
        """A run is worth more than its curves: it goes on without them."""
        try:
            yield
        except OSError as error:
            log.warning("TensorBoard's event file cannot be written: %s", error)


class WandbTracker:
    """A run of Weights & Biases, by its environment's settings (WANDB_MODE=offline and so on)."""

    def __init__(self, project: str, folder: Path, config: TrainConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("wandb is set, but its package is missing: pip install wandb") from error
        try:
            self._run: Any = wandb.init(
                project=project,
                name=folder.name,
                id=_run_id(folder),
                resume="allow",
                dir=str(folder),
                config=flat(to_mapping(config)),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"Weights & Biases does not start: {first_line(error)}; `wandb login`, or WANDB_MODE=offline"
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def open_trackers(config: TrainConfig, folder: Path, step: int) -> list[Tracker]:
    """Opens what `config` asks for. For the first process alone.

    Raises:
        ConfigError: a package is missing, or Weights & Biases refuses.
    """
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorBoardTracker(folder / "tensorboard", step))
    if config.wandb:
        trackers.append(WandbTracker(config.wandb, folder, config))
    return trackers


def epoch_values(row: EpochMetrics) -> dict[str, float]:
    """An epoch's figures, named for trackers."""
    skip = ("epoch", "step", "seconds")
    return {f"epoch/{name}": value for name, value in dataclasses.asdict(row).items() if name not in skip}


def _run_id(folder: Path) -> str:
    """A resumed run keeps its id, which is that of its folder."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
