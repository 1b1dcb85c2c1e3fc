"""Experiment trackers: TensorBoard and Weights & Biases."""

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
from train.config_file import flatten, to_mapping
from train.reporting import EpochMetrics

__all__ = ["TensorBoardTracker", "Tracker", "WandbTracker", "epoch_values", "open_trackers"]

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Records values over time. A resumed run continues the record of the interrupted one."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record named values of update `step`."""

    def close(self) -> None:
        """Write buffered values."""


class TensorBoardTracker:
    """Writes event files for `tensorboard --logdir runs`."""

    def __init__(self, folder: Path, step: int) -> None:
        """`step`: finished updates; TensorBoard hides later values of an interrupted run."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        with self._warn_if_disk_is_full():
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        with self._warn_if_disk_is_full():
            self._writer.close()

    @contextmanager
    def _warn_if_disk_is_full(self) -> Iterator[None]:
        """Turn a failed write into a warning: training matters more than its curves."""
        try:
            yield
        except OSError as error:
            log.warning("cannot write TensorBoard's event file: %s", error)


class WandbTracker:
    """Logs to Weights & Biases, with the settings of its environment (WANDB_MODE=offline, …)."""

    def __init__(self, project: str, folder: Path, config: TrainConfig) -> None:
        """Start a run of `project`, or continue the run that logged `folder` before.

        Raises:
            ConfigError: wandb is not installed, or Weights & Biases does not start.
        """
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("the setting wandb needs the package wandb: pip install wandb") from error
        try:
            self._run: Any = wandb.init(
                project=project,
                name=folder.name,
                id=_run_id(folder),
                resume="allow",
                dir=str(folder),
                config=flatten(to_mapping(config)),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"Weights & Biases does not start: {first_line(error)}; run `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def open_trackers(config: TrainConfig, folder: Path, step: int) -> list[Tracker]:
    """Open the trackers that `config` enables. Only the first process calls it.

    Raises:
        ConfigError: a package is missing, or Weights & Biases does not start.
    """
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorBoardTracker(folder / "tensorboard", step))
    if config.wandb:
        trackers.append(WandbTracker(config.wandb, folder, config))
    return trackers


def epoch_values(row: EpochMetrics) -> dict[str, float]:
    """Return the metrics of an epoch under the names that trackers show."""
    skip = ("epoch", "step", "seconds", "branch_losses")
    values = {name: value for name, value in dataclasses.asdict(row).items() if name not in skip and value is not None}
    values |= {f"loss/{name}": value for name, value in row.branch_losses.items()}
    return {f"epoch/{name}": value for name, value in values.items()}


def _run_id(folder: Path) -> str:
    """Return the run's id. It depends on the folder only, so a resumed run has the same one."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
