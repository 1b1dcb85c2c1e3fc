"""`TrainState`: everything a run needs to resume, saved to and loaded from `last.pt`."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from runtime.errors import AdvPropError, CheckpointError, TrainingDiverged, first_line
from runtime.spec import ModelSpec
from train.build import make_scheduler, model_arguments
from train.checkpoint import load_checkpoint, save_checkpoint
from train.config import TrainConfig
from train.config_file import to_toml
from train.distributed import barrier, gather, rank, world_size
from train.reporting import EpochMetrics
from train.resume import Change, changed_settings, check_resumable, check_spec

__all__ = ["TrainState", "preserve_rng", "rng_state", "set_rng_state"]

log = logging.getLogger(__name__)

_RESUME_ONLY = ("optimizer", "scheduler", "scaler", "rng", "loss_sum", "branch_loss_sums")
"""Keys of `last.pt` that `best.pt` does not have."""


@dataclass(slots=True, kw_only=True)
class TrainState:
    """The state of a training run. `save` and `load` use one file, the same for all processes."""

    config: TrainConfig
    """Settings of the run."""
    spec: ModelSpec
    """Description of the network, which exported files carry."""
    model: nn.Module
    """The trained network, not wrapped by DDP or torch.compile."""
    ema: nn.Module | None
    """Moving average of the network, if `config.optim.ema_decay` is set."""
    optimizer: torch.optim.Optimizer
    """Optimizer of `model`."""
    scheduler: Any
    """timm's learning rate schedule."""
    scaler: torch.amp.GradScaler
    """Gradient scaler; disabled unless training uses FP16."""
    sample: dict[str, torch.Tensor]
    """Validation images (uint8, NHWC) and labels on which exports are verified."""
    loss_sum: torch.Tensor
    """Sum of the losses of the current epoch's batches, on the device of training."""
    branch_loss_sums: dict[str, torch.Tensor]
    """The same for the loss of each branch."""
    train_images: int
    """Number of training images."""
    lr: float
    """Learning rate of the last update."""
    images: int = 0
    """Clean images of the current epoch, in all processes."""
    seconds: float = 0.0
    """Training time of the current epoch."""
    epoch: int = 0
    """Finished epochs."""
    batch: int = 0
    """Finished batches of the current epoch."""
    step: int = 0
    """Parameter updates."""
    metrics: list[EpochMetrics] = field(default_factory=list)
    """Metrics of the finished epochs."""
    changes: list[Change] = field(default_factory=list)
    """Settings that changed when the run resumed."""
    schedule_start: float = 0.0
    """Epoch at which the learning rate schedule started."""
    schedule_offset: int = 0
    """Updates before the first one of the schedule."""

    def add_losses(self, loss: torch.Tensor, by_name: Mapping[str, torch.Tensor]) -> None:
        """Add the losses of a batch to the sums of the epoch.

        Args:
            loss: the loss of the batch.
            by_name: losses by the names `loss/BRANCH`; other names are ignored.
        """
        self.loss_sum += loss
        for name, value in by_name.items():
            kind, slash, branch = name.partition("/")
            if slash and kind == "loss":
                self.branch_loss_sums[branch] = self.branch_loss_sums.get(branch, torch.zeros_like(value)) + value

    def finish_epoch(self, metrics: EpochMetrics) -> None:
        """Append the metrics of the current epoch and advance to the next one."""
        self.metrics.append(metrics)
        self.epoch, self.batch, self.loss_sum = self.epoch + 1, 0, torch.zeros_like(self.loss_sum)
        self.branch_loss_sums = {}
        self.images, self.seconds = 0, 0.0

    def save(self, path: Path) -> None:
        """Write the state to `path`, atomically. All processes call it; the first one writes.

        Raises:
            TrainingDiverged: a weight is not finite; nothing is written.
            OutputError: `path` cannot be written.
        """
        weights: list[torch.Tensor] = list(self.model.parameters())
        if not torch.stack(torch._foreach_norm(weights)).isfinite().all().item():
            raise TrainingDiverged(
                f"the weights are not finite after step {self.step} of epoch {self.epoch + 1}, so they were not saved. "
                f"Lower the learning rate (--lr, now {self.config.resolved_lr:g})"
            )
        generators = gather(rng_state())
        if rank() == 0:
            save_checkpoint(path, self._to_checkpoint(generators))
        barrier()

    def save_weights(self, path: Path) -> None:
        """Write the state without what only a resumed run needs. Only the first process calls it.

        Raises:
            OutputError: `path` cannot be written.
        """
        content = self._to_checkpoint([])
        save_checkpoint(path, {name: value for name, value in content.items() if name not in _RESUME_ONLY})

    def load(self, path: Path) -> list[Change]:
        """Continue from the state in `path`, and return the settings that differ from now on.

        Raises:
            CheckpointError: it is not a checkpoint, it is damaged, it holds weights only, or the run
                that wrote it has other settings that cannot change.
        """
        checkpoint = load_checkpoint(path)
        check_resumable(checkpoint, path)
        try:
            changes = changed_settings(checkpoint, path, self.config)
            may_move = self.config.data.root is not None and self.config.data.dataset is None
            check_spec(checkpoint, path, self.spec, may_move=may_move)
            self._restore(checkpoint, path)
            self.changes += changes
            return changes
        except AdvPropError:
            raise
        except Exception as error:  # a damaged value can raise almost any exception
            raise CheckpointError(
                f"cannot resume {path}: it is damaged ({type(error).__name__}: {first_line(error)})",
                fix="restore it from a backup, or start a new run with --overwrite",
            ) from error

    def reschedule(self, updates_per_epoch: int, batches_per_epoch: int, *, restart: bool) -> None:
        """Adapt the learning rate schedule to the settings, after they changed.

        Args:
            updates_per_epoch: updates of an epoch.
            batches_per_epoch: batches of an epoch.
            restart: start the schedule again, for the remaining epochs. Otherwise, it continues as
                if the run had started with these settings.
        """
        now = self.epoch + self.batch / max(1, batches_per_epoch)
        if restart:
            self.schedule_start = now
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"] = self.config.resolved_lr
        length = max(self.config.resolved_epochs - self.schedule_start, 1 / updates_per_epoch)
        self.scheduler = make_scheduler(self.config, self.optimizer, updates_per_epoch, length)
        done = round((now - self.schedule_start) * updates_per_epoch)
        self.schedule_offset = self.step - done
        self.scheduler.step_update(done)
        log.info(
            "the %s schedule %s epoch %d; the next learning rate is %.3g",
            self.config.optim.schedule,
            "starts again, and ends with" if restart else "is now that of a run that ends with",
            self.config.resolved_epochs,
            max(group["lr"] for group in self.optimizer.param_groups),
        )

    def _restore(self, checkpoint: Mapping[str, Any], path: Path) -> None:
        self.model.load_state_dict(checkpoint["state_dict"])
        if self.ema is not None:  # it starts here if the run had none
            self.ema.load_state_dict(checkpoint["ema_state_dict"] or checkpoint["state_dict"])
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        self.scheduler.load_state_dict(checkpoint["scheduler"])
        if checkpoint["scaler"] is not None and self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch, self.batch, self.step = (int(checkpoint[name]) for name in ("epoch", "batch", "step"))
        self.loss_sum = checkpoint["loss_sum"].to(self.loss_sum.device)
        self.metrics = [EpochMetrics(**row) for row in checkpoint["metrics"]]
        # Earlier versions did not store these values.
        self.lr = float(checkpoint.get("lr", self.lr))
        sums = checkpoint.get("branch_loss_sums", {})
        self.branch_loss_sums = {name: value.to(self.loss_sum.device) for name, value in sums.items()}
        self.changes = [Change(**change) for change in checkpoint.get("changes", [])]
        self.schedule_start = float(checkpoint.get("schedule_start", 0.0))
        self.schedule_offset = int(checkpoint.get("schedule_offset", 0))
        self.images, self.seconds = int(checkpoint.get("images", 0)), float(checkpoint.get("seconds", 0.0))
        if checkpoint.get("train_images", self.train_images) != self.train_images:
            log.warning(
                "%s was written with %d training images, and there are %d now: the order of the images changes, so "
                "the result will differ from that of an uninterrupted run",
                path,
                checkpoint["train_images"],
                self.train_images,
            )
        generators = checkpoint["rng"]
        if len(generators) == world_size():
            set_rng_state(generators[rank()])
        else:
            log.warning(
                "%d processes wrote %s and %d resume it: the random numbers of the attack will differ from those of an "
                "uninterrupted run",
                len(generators),
                path,
                world_size(),
            )

    def _to_checkpoint(self, generators: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "arch": self.config.arch,
            "model_kwargs": model_arguments(self.config, len(self.spec.classes)),
            "recipe": self.config.recipe,
            "spec": self.spec.to_json(),
            "state_dict": self.model.state_dict(),
            "ema_state_dict": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler.is_enabled() else None,
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "branch_loss_sums": self.branch_loss_sums,
            "schedule_start": self.schedule_start,
            "schedule_offset": self.schedule_offset,
            "changes": [dataclasses.asdict(change) for change in self.changes],
            "train_images": self.train_images,
            "lr": self.lr,
            "images": self.images,
            "seconds": self.seconds,
            "rng": generators,
            "metrics": [dataclasses.asdict(row) for row in self.metrics],
            "config": to_toml(self.config),
            "sample": self.sample,
            "versions": {name: metadata.version(name) for name in ("torch", "timm", "numpy")},
        }


def rng_state() -> dict[str, Any]:
    """Return the state of every random generator that training draws from."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore the random generators to the result of `rng_state`."""
    random.setstate(_as_tuple(state["python"]))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Restore the random generators at the end of the context.

    Some libraries draw random numbers when they are first imported. Without this, a resumed run,
    which imports them at another time, would differ from an uninterrupted one.
    """
    before = rng_state()
    try:
        yield
    finally:
        set_rng_state(before)


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list | tuple) else value
