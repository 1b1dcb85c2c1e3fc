"""`fit`: the training loop, from a TrainConfig to checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from runtime.errors import CheckpointError, ConfigError, Interrupted, TrainingDiverged
from runtime.files import output_dir
from runtime.images import decode, fit_to_input
from runtime.spec import ModelSpec, Preprocessing
from train.attack import evaluation_attack
from train.checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from train.config import TrainConfig
from train.data import (
    Batches,
    ImageData,
    choose_preprocessing,
    embedded_digits,
    eval_loader,
    image_folder,
    train_loader,
)
from train.evaluate import attacked_accuracy, clean_accuracy
from train.models import create_model
from train.recipes import find_recipe
from train.reporting import EpochMetrics, Reporter, SilentReporter, read_metrics, write_metrics
from train.task import AdvPropTask

__all__ = ["FitResult", "fit"]

log = logging.getLogger(__name__)

_SAMPLE_IMAGES = 64
_SAMPLE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """What a finished run leaves."""

    last: Path
    """Checkpoint of the last epoch."""
    best: Path
    """Checkpoint of the epoch with the best clean accuracy."""
    metrics: tuple[EpochMetrics, ...]
    """All epochs."""


def fit(config: TrainConfig, reporter: Reporter | None = None) -> FitResult:
    """Trains as `config` says, writing `last.pt`, `best.pt` and `metrics.csv` after each epoch.

    SIGINT and SIGTERM end the run after the step in progress: `last.pt` is written first,
    and `config.resume` continues it where it stopped.

    Raises:
        AdvPropError: any of `runtime.errors`: unknown or unsuitable architecture, unusable
            images, an output folder that cannot be written, a loss that is not finite.
        Interrupted: the run was asked to stop.
    """
    reporter = reporter or SilentReporter()
    try:
        return _Run(config, reporter).train()
    finally:
        reporter.close()


class _Run:
    """The state of one training run."""

    def __init__(self, config: TrainConfig, reporter: Reporter) -> None:
        self.config, self.reporter = config, reporter
        recipe = find_recipe(config.recipe)
        self.out = output_dir(config.resolved_out)
        self.device = _device(config.device)
        _seed_everything(config.seed)
        self.data = _open_data(config)
        self.model_kwargs: dict[str, Any] = {"num_classes": len(self.data.classes)}
        if config.drop_path:
            self.model_kwargs["drop_path_rate"] = config.drop_path
        model = create_model(config.arch, pretrained=config.pretrained, **self.model_kwargs)
        spec = choose_preprocessing(self.data, config.data, resolve_model_data_config(model))
        self.spec = ModelSpec(
            arch=config.arch,
            classes=self.data.classes,
            wnids=self.data.wnids,
            preprocessing=spec,
            dataset=self.data.name,
            recipe=config.recipe,
        )
        self.task = AdvPropTask(
            model.to(self.device).to(memory_format=torch.channels_last),
            recipe,
            attack=config.attack,
            mean=spec.mean,
            std=spec.std,
            criterion_kwargs={"smoothing": config.optim.label_smoothing},
            device=self.device,
        )
        self.model: nn.Module = self.task.trainable_module
        self.model.to(self.device)
        if config.optim.ema_decay:
            self.task.setup_ema(decay=config.optim.ema_decay, use_warmup=True)
        self._open_loaders(spec)
        self.optimizer, self.scheduler = _optimisation(config, self.model, len(self.batches))
        self.attack = evaluation_attack(config.attack, spec.mean, spec.std)
        self.sample = _sample(self.data, spec)
        self.epoch = self.batch = self.step = 0
        self.loss_sum = torch.zeros((), device=self.device)
        self.rows: list[EpochMetrics] = []
        self.stop: signal.Signals | None = None
        # Anew: what building drew (a library's first import may draw too) must not show in training.
        _seed_everything(config.seed + 1)

    def _open_loaders(self, spec: Preprocessing) -> None:
        config = self.config
        common: dict[str, Any] = {"device": self.device, "channels_last": True}
        self.batches: Batches = train_loader(
            self.data,
            config.data,
            spec,
            batch_size=config.resolved_batch_size(spec.height),
            seed=config.seed,
            **common,
        )
        self.val = eval_loader(self.data, config.data, spec, batch_size=128, **common)
        every = -(-len(self.data.val.labels) // config.eval_attack_images)
        self.val_attacked = eval_loader(self.data, config.data, spec, batch_size=128, every=every, **common)

    def train(self) -> FitResult:
        """Runs all epochs that are left."""
        epochs = self.config.resolved_epochs
        if self.config.resume:
            self._resume()
        seconds: list[float] = []
        with _signals(self):
            for epoch in range(self.epoch, epochs):
                began = time.monotonic()
                trained, images_per_s = self._train_epoch(epoch, epochs)
                self.reporter.evaluating()
                row = EpochMetrics(
                    epoch=epoch + 1,
                    step=self.step,
                    lr=self.optimizer.param_groups[0]["lr"],
                    loss=self.loss_sum.item() / max(1, self.batch),
                    top1=clean_accuracy(self.eval_model, self.val),
                    top1_attacked=attacked_accuracy(self.eval_model, self.val_attacked, self.attack),
                    images_per_s=images_per_s,
                    seconds=trained,
                )
                self.rows.append(row)
                self.epoch, self.batch, self.loss_sum = epoch + 1, 0, torch.zeros_like(self.loss_sum)
                self._save()
                if row.top1 >= max(other.top1 for other in self.rows):
                    _replace_by_copy(self.last, self.best)
                write_metrics(self.out / "metrics.csv", self.rows)
                seconds.append(time.monotonic() - began)
                left = (epochs - epoch - 1) * sum(seconds) / len(seconds)
                self.reporter.epoch_ended(row, epochs, left)
                self._stop_if_asked()
        return FitResult(last=self.last, best=self.best, metrics=tuple(self.rows))

    @property
    def last(self) -> Path:
        return self.out / "last.pt"

    @property
    def best(self) -> Path:
        return self.out / "best.pt"

    @property
    def eval_model(self) -> nn.Module:
        """The weights that would be exported: the moving average where there is one."""
        ema = self.task.get_trainable_module(ema=True)
        model: nn.Module = self.model if ema is None else ema.module
        return model

    def _train_epoch(self, epoch: int, epochs: int) -> tuple[float, float]:
        """Returns the seconds spent and the clean images a second."""
        self.task.train()
        self.batches.start_at(epoch, self.batch)
        steps = len(self.batches) + self.batch
        self.reporter.epoch_started(epoch + 1, epochs, steps, self.batch)
        began, images_seen = time.monotonic(), 0
        for images, labels in self.batches:
            loss = self._step(images, labels)
            self.loss_sum += loss
            images_seen += len(labels)
            self.batch += 1
            at_hand = self.device.type == "cpu" or self.batch % 50 == 0 or self.batch == steps
            if at_hand:
                self._check_finite()
            self.reporter.stepped(loss.item() if at_hand else None)
            if self.stop is not None:
                self._save()
                self._stop_if_asked()
        seconds = time.monotonic() - began
        return seconds, images_seen / max(seconds, 1e-9)

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One update; returns the loss, detached."""
        loss: torch.Tensor = self.task(images, labels)["loss"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.config.optim.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad)
        self.optimizer.step()
        self.step += 1
        self.scheduler.step_update(self.step)
        self.task.update_ema(self.step)
        return loss.detach()

    def _check_finite(self) -> None:
        if math.isfinite(self.loss_sum.item()):
            return
        kept = f"the last good checkpoint is {self.last}" if self.last.exists() else "no checkpoint was written yet"
        raise TrainingDiverged(
            f"the loss is not finite at epoch {self.epoch + 1}, step {self.step}; {kept}. "
            f"Lower the learning rate (--lr, now {self.config.optim.lr:g})"
        )

    def _stop_if_asked(self) -> None:
        if self.stop is not None:
            code = 130 if self.stop == signal.SIGINT else 143
            raise Interrupted(
                f"stopped by {self.stop.name} in epoch {self.epoch + 1} after step {self.step}; saved in "
                f"{self.last}, --resume continues from there",
                code,
            )

    def _save(self) -> None:
        ema = self.task.get_trainable_module(ema=True)
        save_checkpoint(
            self.last,
            {
                "arch": self.config.arch,
                "model_kwargs": self.model_kwargs,
                "recipe": self.config.recipe,
                "spec": self.spec.to_json(),
                "state_dict": self.model.state_dict(),
                "ema_state_dict": None if ema is None else ema.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": None,
                "epoch": self.epoch,
                "batch": self.batch,
                "step": self.step,
                "loss_sum": self.loss_sum,
                "rng": rng_state(),
                "metrics": [dataclasses.asdict(row) for row in self.rows],
                "config": _config_json(self.config),
                "sample": self.sample,
                "versions": {name: metadata.version(name) for name in ("torch", "timm", "numpy")},
            },
        )

    def _resume(self) -> None:
        if not self.last.exists():
            log.info("nothing to resume in %s: starting anew", self.out)
            return
        checkpoint = load_checkpoint(self.last)
        for key, mine in (("arch", self.config.arch), ("recipe", self.config.recipe), ("spec", self.spec.to_json())):
            if checkpoint[key] != mine:
                raise CheckpointError(
                    f"{self.last} cannot be resumed with another {key}: found {checkpoint[key]}, expected {mine}; "
                    "give the settings it was started with, or another --out"
                )
        self.model.load_state_dict(checkpoint["state_dict"])
        ema = self.task.get_trainable_module(ema=True)
        if ema is not None and checkpoint["ema_state_dict"] is not None:
            ema.module.load_state_dict(checkpoint["ema_state_dict"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scheduler.load_state_dict(checkpoint["scheduler"])
        self.epoch, self.batch, self.step = checkpoint["epoch"], checkpoint["batch"], checkpoint["step"]
        self.loss_sum = checkpoint["loss_sum"].to(self.device)
        self.rows = read_metrics(checkpoint["metrics"])
        set_rng_state(checkpoint["rng"])
        log.info("resuming %s at epoch %d, step %d", self.last, self.epoch + 1, self.step)


def _open_data(config: TrainConfig) -> ImageData:
    if config.data.root is not None:
        return image_folder(config.data.root)
    data = embedded_digits()
    log.warning(
        "no --data given: training on the embedded digits, %d images (%d more held out)",
        len(data.train.labels),
        len(data.val.labels),
    )
    return data


def _optimisation(config: TrainConfig, model: nn.Module, updates_per_epoch: int) -> tuple[torch.optim.Optimizer, Any]:
    optim = config.optim
    try:
        optimizer = create_optimizer_v2(model, opt=optim.optimizer, lr=optim.lr, weight_decay=optim.weight_decay)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"timm has no optimiser {optim.optimizer!r}: {error}") from error
    epochs = config.resolved_epochs
    warmup = min(optim.warmup_epochs, epochs / 2)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=optim.schedule,
        num_epochs=epochs,
        warmup_epochs=warmup,
        warmup_lr=optim.lr / 100,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    scheduler.step_update(0)
    return optimizer, scheduler


def _sample(data: ImageData, spec: Preprocessing) -> dict[str, torch.Tensor]:
    """Validation images, spread evenly, for the exporter to verify itself on."""
    size = spec.height * spec.width * 3
    count = max(8, min(_SAMPLE_IMAGES, _SAMPLE_BYTES // size))
    every = max(1, len(data.val.labels) // count)
    images: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    labels: list[int] = []
    for image, label in zip(data.val.images[::every], data.val.labels[::every], strict=True):
        if len(images) == count:
            break
        with contextlib.suppress(ValueError):  # an image that cannot be decoded; the loader names it
            images.append(fit_to_input(decode(image), spec))
            labels.append(label)
    return {"images": torch.from_numpy(np.stack(images)), "labels": torch.tensor(labels)}


def _device(name: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name!r} is not a torch device: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: torch {torch.__version__} finds no NVIDIA GPU; use --device cpu")
    return device


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


def _config_json(config: TrainConfig) -> str:
    return json.dumps(dataclasses.asdict(config), default=str, sort_keys=True)


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
