"""`TrainState`: everything a run needs to resume, saved to and loaded from `last.pt`."""

from __future__ import annotations

import dataclasses
import logging
import random
import tomllib
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
from train.build import model_arguments
from train.checkpoint import load_checkpoint, save_checkpoint
from train.config import TrainConfig
from train.config_file import flatten, to_toml
from train.distributed import barrier, gather, rank, world_size
from train.reporting import EpochMetrics

__all__ = ["TrainState", "preserve_rng", "rng_state", "set_rng_state"]

log = logging.getLogger(__name__)

_MAY_CHANGE = {
    *("out", "resume", "overwrite", "device", "compile", "save_every", "log_every", "tensorboard", "wandb"),
    *("data.root", "data.workers", "data.download", "init_checkpoint"),
}
"""Settings that may differ when a run resumes: they do not change what is learned from there on."""


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

    def finish_epoch(self, metrics: EpochMetrics) -> None:
        """Append the metrics of the current epoch and advance to the next one."""
        self.metrics.append(metrics)
        self.epoch, self.batch, self.loss_sum = self.epoch + 1, 0, torch.zeros_like(self.loss_sum)
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
                f"Lower the learning rate (--lr, now {self.config.optim.lr:g})"
            )
        generators = gather(rng_state())
        if rank() == 0:
            save_checkpoint(path, self._to_checkpoint(generators))
        barrier()

    def load(self, path: Path) -> None:
        """Continue from the state in `path`.

        Raises:
            CheckpointError: it is not a checkpoint, it is damaged, or a run with other settings wrote
                it.
        """
        checkpoint = load_checkpoint(path)
        try:
            self._check_same_run(checkpoint, path)
            self._restore(checkpoint, path)
        except AdvPropError:
            raise
        except Exception as error:  # a damaged value can raise almost any exception
            raise CheckpointError(
                f"cannot resume {path}: it is damaged ({type(error).__name__}: {first_line(error)})",
                fix="restore it from a backup, or start a new run with --overwrite",
            ) from error

    def _restore(self, checkpoint: Mapping[str, Any], path: Path) -> None:
        self.model.load_state_dict(checkpoint["state_dict"])
        if self.ema is not None and checkpoint["ema_state_dict"] is not None:
            self.ema.load_state_dict(checkpoint["ema_state_dict"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scheduler.load_state_dict(checkpoint["scheduler"])
        if checkpoint["scaler"] is not None:
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch, self.batch, self.step = (int(checkpoint[name]) for name in ("epoch", "batch", "step"))
        self.loss_sum = checkpoint["loss_sum"].to(self.loss_sum.device)
        self.metrics = [EpochMetrics(**row) for row in checkpoint["metrics"]]
        # Earlier versions did not store these values.
        self.lr = float(checkpoint.get("lr", self.lr))
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

    def _check_same_run(self, checkpoint: Mapping[str, Any], path: Path) -> None:
        """Raise CheckpointError if settings or spec differ from those in the checkpoint."""
        before, now = (flatten(tomllib.loads(text)) for text in (checkpoint["config"], to_toml(self.config)))
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name) and name not in _MAY_CHANGE]
        if not changed:
            stored = ModelSpec.from_json(checkpoint["spec"], where=str(path))
            before, now = dataclasses.asdict(stored), dataclasses.asdict(self.spec)
            # A folder of images may be moved or renamed; its name is that of the dataset.
            moved = self.config.data.root is not None and self.config.data.dataset is None
            changed = [name for name in now if before[name] != now[name] and not (moved and name == "dataset")]
        if changed:
            differences = "; ".join(
                f"{name}: found {str(before.get(name))[:80]}, expected {str(now.get(name))[:80]}" for name in changed
            )
            raise CheckpointError(
                f"cannot resume {path}: a run with other settings wrote it ({differences}). Use the settings that the "
                f"run started with (--config {path.with_name('config.toml')}), or another --out"
            )


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
