"""`fit`: the training loop, from a TrainConfig to checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import signal
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from timm.data import resolve_model_data_config
from timm.utils.distributed import distribute_bn
from timm.utils.model import unwrap_model
from torch import nn

from runtime.errors import CheckpointError, ConfigError, Interrupted, TrainingDiverged
from runtime.spec import ModelSpec, Preprocessing
from runtime.system.files import output_dir, write_text
from train.attack import evaluation_attack
from train.build import (
    make_device,
    make_model,
    make_optimization,
    make_sample,
    make_task,
    model_arguments,
    seed_everything,
)
from train.checkpoint import load_checkpoint, rng_kept, rng_state, save_checkpoint, set_rng_state
from train.config import TrainConfig
from train.config_file import flat, to_toml
from train.data import choose_preprocessing
from train.datasets import open_data
from train.distributed import barrier, gather, process_group, rank, world_size, world_sum
from train.evaluate import accuracy
from train.loaders import Batches, eval_loader, train_loader
from train.plots import plot_curves
from train.recipes import find_recipe
from train.reporting import EpochMetrics, Reporter, SilentReporter, best_epoch, read_metrics, write_metrics
from train.tracking import Tracker, epoch_values, open_trackers

__all__ = ["FitResult", "fit"]

log = logging.getLogger(__name__)

_CHECK_EVERY = 50
"""Steps between looks at the loss on a GPU, where each look waits for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """What a finished run leaves."""

    last: Path
    """Checkpoint of the last epoch."""
    best: Path
    """Checkpoint of the epoch with the best clean accuracy."""
    metrics: tuple[EpochMetrics, ...]
    """All epochs."""

    @property
    def best_epoch(self) -> EpochMetrics:
        """The epoch that `best` is of: the first with the best clean accuracy."""
        return best_epoch(self.metrics)


def fit(config: TrainConfig, reporter: Reporter | None = None) -> FitResult:
    """Trains as `config` says, writing `last.pt`, `best.pt` and `metrics.csv` after each epoch.

    Under torchrun, all processes call it with the same config; the first one writes.
    SIGINT and SIGTERM end the run after the step in progress: `last.pt` is written first,
    and `config.resume` continues it where it stopped.

    Raises:
        AdvPropError: any of `runtime.errors`: unknown or unsuitable architecture, unusable
            images, an output folder that cannot be written, a loss that is not finite.
        Interrupted: the run was asked to stop.
    """
    reporter = reporter or SilentReporter()
    try:
        with process_group(make_device(config.device)) as device:
            return _Run(config, reporter, device).train()
    finally:
        reporter.close()


class _Run:
    """The state of one training run, in one of its processes."""

    def __init__(self, config: TrainConfig, reporter: Reporter, device: torch.device) -> None:
        self.config, self.reporter, self.device = config, reporter, device
        recipe = find_recipe(config.recipe)
        self.out = output_dir(config.resolved_out)
        if self.last.exists() and config.resume == "never" and not config.overwrite:
            raise ConfigError(
                f"{self.last} is of another run: continue it with --resume, choose another --out, or lose it with "
                "--overwrite"
            )
        seed_everything(config.seed)
        self.data = open_data(config.data)
        classes = len(self.data.classes)
        model = make_model(config, recipe, classes)
        spec = choose_preprocessing(self.data, config.data, _model_config(model))
        self.spec = ModelSpec(
            arch=config.arch,
            classes=self.data.classes,
            wnids=self.data.wnids,
            preprocessing=spec,
            dataset=self.data.name,
            recipe=config.recipe,
        )
        self.task = make_task(config, recipe, model, spec, classes, device)
        self.model: nn.Module = unwrap_model(self.task.trainable_module)
        self._open_loaders(spec, recipe.views)
        updates = -(-len(self.batches) // config.optim.accumulate)
        self.optimizer, self.scheduler = make_optimization(config, self.model, updates)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.attack = evaluation_attack(config.resolved_attack(recipe).epsilon, spec.mean, spec.std)
        self.sample = make_sample(self.data, spec)
        self.epoch = self.batch = self.step = 0
        self.loss_sum = torch.zeros((), device=device)
        self.first_bad = torch.full((), -1, device=device)
        self.rows: list[EpochMetrics] = []
        self.trackers: list[Tracker] = []
        self.parts: dict[str, torch.Tensor] = {}
        self.lr = config.optim.lr
        self.stop: signal.Signals | None = None
        # Anew: what building drew (a library's first import may draw too) must not show in training.
        seed_everything(config.seed + 1 + rank())

    def _open_loaders(self, spec: Preprocessing, views: int) -> None:
        config = self.config
        common: dict[str, Any] = {
            "device": self.device,
            "channels_last": True,
            "rank": rank(),
            "world": world_size(),
        }
        self.batches: Batches = train_loader(
            self.data,
            config.data,
            spec,
            batch_size=config.resolved_batch_size(spec.height),
            seed=config.seed,
            views=views,
            **common,
        )
        size = max(2, min(128, config.resolved_batch_size(spec.height)))  # what training has memory for
        self.val = eval_loader(self.data, config.data, spec, batch_size=size, **common)
        every = -(-len(self.data.val) // config.eval_attack_images)
        self.val_attacked = eval_loader(self.data, config.data, spec, batch_size=size, every=every, **common)

    def train(self) -> FitResult:
        """Runs all epochs that are left."""
        epochs = self.config.resolved_epochs
        if self.config.resume == "auto":
            self._resume()
        if rank() == 0:
            write_text(self.out / "config.toml", to_toml(self.config))
            with rng_kept():
                self.trackers = open_trackers(self.config, self.out, self.step)
        try:
            with _signals(self):
                self._train_epochs(epochs)
        finally:
            for tracker in self.trackers:
                tracker.close()
        return FitResult(last=self.last, best=self.best, metrics=tuple(self.rows))

    def _train_epochs(self, epochs: int) -> None:
        seconds: list[float] = []
        for epoch in range(self.epoch, epochs):
            began = time.monotonic()
            trained, images_per_s = self._train_epoch(epoch, epochs)
            self._save()  # evaluation takes a while, and may be where a run ends
            self.reporter.evaluating()
            row = self._evaluate(epoch, trained, images_per_s)
            self.rows.append(row)
            self.epoch, self.batch, self.loss_sum = epoch + 1, 0, torch.zeros_like(self.loss_sum)
            self._save()
            self._publish()
            self._track(epoch_values(row))
            seconds.append(time.monotonic() - began)
            left = (epochs - epoch - 1) * sum(seconds) / len(seconds)
            self.reporter.epoch_ended(row, epochs, left)
            self._agree_on_stop()
            if self.epoch < epochs:
                self._stop_if_asked()

    @property
    def last(self) -> Path:
        return self.out / "last.pt"

    @property
    def best(self) -> Path:
        return self.out / "best.pt"

    @property
    def ema(self) -> nn.Module | None:
        """The moving average of the weights, where one is kept."""
        ema = self.task.get_trainable_module(ema=True)
        return None if ema is None else unwrap_model(ema.module)

    @rng_kept()
    def _publish(self) -> None:
        """Writes what follows from `last.pt` at the end of an epoch; again after a resume, in
        case that the run was killed in between."""
        if rank() != 0 or not self.rows:
            return
        if self.rows[-1].top1 > max((other.top1 for other in self.rows[:-1]), default=-1.0):
            _replace_by_copy(self.last, self.best)
        write_metrics(self.out / "metrics.csv", self.rows)
        plot_curves(self.out / "curves.png", self.rows, f"{self.config.arch}, {self.config.recipe}, {self.data.name}")

    @rng_kept()
    def _track(self, values: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(self.step, values)

    def _evaluate(self, epoch: int, seconds: float, images_per_s: float) -> EpochMetrics:
        """Measures the weights that would be exported: the moving average where there is one."""
        if world_size() > 1 and not self.config.sync_bn:
            distribute_bn(self.model, world_size(), reduce=True)
        model = self.model if self.ema is None else self.ema
        return EpochMetrics(
            epoch=epoch + 1,
            step=self.step,
            lr=self.lr,
            loss=world_sum(self.loss_sum).item() / world_size() / max(1, self.batch),
            top1=accuracy(model, self._unless_stopped(self.val)),
            top1_attacked=accuracy(model, self._unless_stopped(self.val_attacked), self.attack),
            images_per_s=images_per_s,
            seconds=seconds,
        )

    def _unless_stopped(self, batches: Batches) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Lets a stop end evaluation at once: the epoch is saved already."""
        for batch in batches:
            if world_size() == 1:
                self._stop_if_asked()
            yield batch

    def _train_epoch(self, epoch: int, epochs: int) -> tuple[float, float]:
        """Returns the seconds spent and the clean images a second, of all processes together."""
        self.task.train()
        self.batches.start_at(epoch, self.batch)
        steps = len(self.batches) + self.batch
        accumulate = self.config.optim.accumulate
        self.reporter.epoch_started(epoch + 1, epochs, steps, self.batch)
        began, images_seen = time.monotonic(), 0
        for images, labels in self.batches:
            # The last group of an epoch may be smaller.
            group = min(accumulate, steps - self.batch // accumulate * accumulate)
            updates = (self.batch + 1) % accumulate == 0 or self.batch + 1 == steps
            loss = self._step(images, labels, group, updates)
            self.loss_sum += loss
            self.first_bad = torch.where((self.first_bad < 0) & ~torch.isfinite(loss), self.batch, self.first_bad)
            self.batch += 1
            images_seen += len(labels) * world_size()
            at_hand = self.device.type == "cpu" or self.batch % _CHECK_EVERY == 0 or self.batch == steps
            if at_hand:
                self._check_finite()
            self.reporter.stepped(loss.item() if at_hand else None)
            if updates and self.trackers and self.step % self.config.log_every == 0:
                self._track({name: value.item() for name, value in self.parts.items()} | {"lr": self.lr})
            if updates:
                self._save_where_due()
        seconds = time.monotonic() - began
        return seconds, images_seen / max(seconds, 1e-9)

    def _step(self, images: torch.Tensor, labels: torch.Tensor, group: int, updates: bool) -> torch.Tensor:
        """Adds the gradients of one batch of a `group` and, where it `updates`, makes an update.

        Returns:
            The batch's loss, detached.
        """
        with contextlib.nullcontext() if updates else self.task.no_sync():
            result = self.task(images, labels)
            loss: torch.Tensor = result["loss"]
            self.parts = {name: value.detach() for name, value in result.items() if name.startswith("loss")}
            self.scaler.scale(loss / group).backward()  # type: ignore[no-untyped-call]
        if updates:
            self.lr = self.optimizer.param_groups[0]["lr"]
            if self.config.optim.clip_grad:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self.scheduler.step_update(self.step)
            self.task.update_ema(self.step)
        return loss.detach()

    def _check_finite(self) -> None:
        bad = int(self.first_bad.item())
        if bad < 0:
            return
        kept = f"the last good checkpoint is {self.last}" if self.last.exists() else "no checkpoint was written yet"
        files = self.batches.names(bad)
        raise TrainingDiverged(
            f"the loss is not finite at epoch {self.epoch + 1}, batch {bad + 1}; {kept}. "
            f"Lower the learning rate (--lr, now {self.config.optim.lr:g}), or look at the batch's images: "
            f"{', '.join(files[:4])}{f' and {len(files) - 4} more' if len(files) > 4 else ''}"
        )

    def _save_where_due(self) -> None:
        """Saves where a stop was asked for, or `save_every` steps have passed."""
        every = self.config.save_every
        together = world_size() == 1 or self.step % 10 == 0
        if together:
            self._agree_on_stop()
        stops = together and self.stop is not None
        if stops or (every and self.step % every == 0):
            self._save()
        if stops:
            self._stop_if_asked()

    def _agree_on_stop(self) -> None:
        """Processes stop together or not at all: one that went on would wait for the others."""
        if world_size() > 1:
            asked = world_sum(torch.tensor([float(self.stop or 0)], device=self.device)).item()
            self.stop = self.stop or (signal.SIGTERM if asked else None)

    def _stop_if_asked(self) -> None:
        if self.stop is not None:
            code = 130 if self.stop == signal.SIGINT else 143
            raise Interrupted(
                f"stopped by {self.stop.name} in epoch {self.epoch + 1} after step {self.step}; saved in "
                f"{self.last}, --resume continues from there",
                code,
            )

    def _save(self) -> None:
        self._check_finite()
        weights: list[torch.Tensor] = list(self.model.parameters())
        if not torch.stack(torch._foreach_norm(weights)).isfinite().all().item():
            raise TrainingDiverged(
                f"weights are not finite after step {self.step} of epoch {self.epoch + 1}; they were not saved. "
                f"Lower the learning rate (--lr, now {self.config.optim.lr:g})"
            )
        generators = gather(rng_state())
        if rank() == 0:
            save_checkpoint(self.last, self._checkpoint(generators))
        barrier()

    def _checkpoint(self, generators: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "arch": self.config.arch,
            "model_kwargs": model_arguments(self.config, len(self.data.classes)),
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
            "rng": generators,
            "metrics": [dataclasses.asdict(row) for row in self.rows],
            "config": to_toml(self.config),
            "sample": self.sample,
            "versions": {name: metadata.version(name) for name in ("torch", "timm", "numpy")},
        }

    def _resume(self) -> None:
        if not self.last.exists():
            log.info("nothing to resume in %s: starting anew", self.out)
            return
        checkpoint = load_checkpoint(self.last)
        _check_same_run(self.last, checkpoint, self.config, self.spec)
        self.model.load_state_dict(checkpoint["state_dict"])
        if self.ema is not None and checkpoint["ema_state_dict"] is not None:
            self.ema.load_state_dict(checkpoint["ema_state_dict"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scheduler.load_state_dict(checkpoint["scheduler"])
        if checkpoint["scaler"] is not None:
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch, self.batch, self.step = checkpoint["epoch"], checkpoint["batch"], checkpoint["step"]
        self.loss_sum = checkpoint["loss_sum"].to(self.device)
        self.rows = read_metrics(checkpoint["metrics"])
        if len(checkpoint["rng"]) == world_size():
            set_rng_state(checkpoint["rng"][rank()])
        else:
            log.warning(
                "%s was written by %d processes, not %d: the attack draws anew",
                self.last,
                len(checkpoint["rng"]),
                world_size(),
            )
        if self.batch == 0:
            self._publish()
        log.info("resuming %s at epoch %d, step %d", self.last, self.epoch + 1, self.step)


_MAY_CHANGE = {
    *("out", "resume", "overwrite", "device", "compile", "save_every", "log_every", "tensorboard", "wandb"),
    *("data.root", "data.workers", "data.download"),
}
"""Settings that a resumed run may have otherwise: they do not change what is learned."""


def _check_same_run(path: Path, checkpoint: dict[str, Any], config: TrainConfig, spec: ModelSpec) -> None:
    """Raises CheckpointError where the checkpoint was written under other settings."""
    before, now = (flat(tomllib.loads(text)) for text in (checkpoint["config"], to_toml(config)))
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name) and name not in _MAY_CHANGE]
    if not changed:
        stored = ModelSpec.from_json(checkpoint["spec"], where=str(path))
        changed = [
            item.name for item in dataclasses.fields(spec) if getattr(stored, item.name) != getattr(spec, item.name)
        ]
        before, now = dataclasses.asdict(stored), dataclasses.asdict(spec)
    if changed:
        told = "; ".join(
            f"{name}: found {str(before.get(name))[:80]}, expected {str(now.get(name))[:80]}" for name in changed
        )
        raise CheckpointError(
            f"{path} was written under other settings ({told}), so the run cannot be resumed; give the settings it was "
            f"started with (--config {path.with_name('config.toml')}), or another --out"
        )


def _model_config(model: nn.Module) -> dict[str, Any]:
    """timm's data configuration of the model, and whether its input size is fixed."""
    fixed = getattr(model, "pretrained_cfg", {}).get("fixed_input_size", False)
    return {**resolve_model_data_config(model), "fixed_input_size": bool(fixed)}


def _replace_by_copy(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`: a hard link where possible, atomically."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _signals(run: _Run) -> Iterator[None]:
    """The first SIGINT or SIGTERM stops after the step in progress, the second at once."""

    def ask(number: int, _: FrameType | None) -> None:
        if run.stop is not None:
            raise KeyboardInterrupt
        run.stop = signal.Signals(number)

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs us handles signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
