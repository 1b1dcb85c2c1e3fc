"""`fit`: the training loop, from a TrainConfig to checkpoints."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.utils.distributed import distribute_bn
from timm.utils.model import unwrap_model
from torch import nn

from runtime.errors import Interrupted, TrainingDiverged
from runtime.spec import ModelSpec, Preprocessing
from train.attack import LinfPGD, Randomness, accuracy, evaluation_attack, measure_quality
from train.balance import check_balance, class_weights
from train.build import (
    make_model,
    make_optimizer,
    make_preprocessing,
    make_sample,
    make_scheduler,
    make_task,
    seed_everything,
)
from train.config import TrainConfig
from train.data import ImageSet
from train.datasets import open_data
from train.distributed import StopRequest, process_group, rank, world_size, world_sum
from train.freezing import Backbone
from train.loaders import Batches, close_all, eval_loader, train_loader
from train.models import resolve_device
from train.output import RunFolder
from train.recipes import find_recipe
from train.reporting import EpochMetrics, Reporter, SilentReporter, best_epoch
from train.resume import with_values
from train.state import TrainState, preserve_rng
from train.tracking import Tracker, epoch_values, open_trackers

__all__ = ["FitResult", "Trainer", "fit"]

log = logging.getLogger(__name__)

_GPU_LOSS_INTERVAL = 50
"""Steps between reads of the loss on a GPU: each read waits for the GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """Result of a finished run."""

    last: Path
    """Checkpoint of the last epoch."""
    best: Path
    """Checkpoint of the epoch with the best clean accuracy."""
    best_epoch: EpochMetrics
    """The epoch that `best` holds: the first one with the best clean accuracy. It can be another
    one if an earlier `best.pt` was lost, which a warning reports when the run resumes."""
    metrics: tuple[EpochMetrics, ...]
    """Metrics of all epochs."""


def fit(config: TrainConfig, reporter: Reporter | None = None) -> FitResult:
    """Train a network; write `last.pt`, `best.pt` and `metrics.csv` after each epoch.

    Under torchrun, all processes call it with the same config and the first one writes.
    On SIGINT or SIGTERM, the run finishes the current step, saves `last.pt` and ends. A run with
    `config.resume` set to "auto" continues from there. A run that fails before it saved a checkpoint
    leaves no new folder behind.

    Raises:
        AdvPropError: one of `runtime.errors`: an unknown or unsuitable architecture, unusable
            images, an output folder that cannot be written, a loss that is not finite.
        Interrupted: a signal stopped the run.
    """
    reporter = reporter or SilentReporter()
    try:
        with contextlib.ExitStack() as stack:
            device = stack.enter_context(process_group(resolve_device(config.device)))
            if rank() == 0:  # the other processes of the run rely on its lock
                folder = RunFolder(config)
                stack.enter_context(folder.removed_on_failure())
                stack.enter_context(folder.reserved())
            return Trainer(config, reporter, device).run()
    finally:
        reporter.close()


class Trainer:
    """One training run, in one of its processes."""

    def __init__(
        self, config: TrainConfig, reporter: Reporter, device: torch.device, randomness: Randomness | None = None
    ) -> None:
        """
        Args:
            config: settings of the run.
            reporter: receives the progress.
            device: the device of this process.
            randomness: source of the training attack's random numbers (default: torch's
                generator).

        Raises:
            AdvPropError: see `fit`; also if the output folder holds another run.
        """
        self.reporter, self.device = reporter, device
        recipe = find_recipe(config.recipe)
        self.folder = RunFolder(config)
        self.last = self.folder.last
        source = self.folder.source
        self.restart_schedule = config.restart_schedule
        self.config = config = with_values(config, source)
        seed_everything(config.seed)
        record = None if source is None else source.with_name("split.csv")
        self.data = open_data(config.data, seed=config.seed, record=record)
        check_balance(self.data, config.data.balance)
        classes = len(self.data.classes)
        model = make_model(config, recipe, self.data.classes, resumes=source is not None)
        preprocessing = make_preprocessing(config, self.data, model)
        mean, std = preprocessing.mean, preprocessing.std
        attack = LinfPGD(config.resolved_attack(recipe), mean, std, randomness)
        weights = None
        if config.data.balance == "loss" and isinstance(self.data.train, ImageSet):
            weights = class_weights(self.data.train.labels, classes)
        self.task = make_task(config, recipe, model, attack, classes, device, weights)
        self.validation_attack = evaluation_attack(attack.config.epsilon, mean, std)
        self._open_loaders(preprocessing, recipe.views)
        self.state = self._initial_state(preprocessing)
        self.backbone = Backbone(self.state.model, config.freeze_backbone)
        self.first_bad = torch.full((), -1, device=device)
        self.losses: dict[str, torch.Tensor] = {}
        self.trackers: list[Tracker] = []
        self.stop = StopRequest()
        # Seed again: the random numbers that setup draws (or that a library draws when it is first
        # imported) must not change the training.
        seed_everything(config.seed + 1 + rank())

    def _open_loaders(self, preprocessing: Preprocessing, views: int) -> None:
        config, data, device = self.config, self.data, self.device
        images = len(data.train) // world_size() if isinstance(data.train, ImageSet) else None
        size = config.resolved_batch_size(preprocessing.height, images)
        if config.batch_size is not None and size < config.batch_size:
            log.warning("batch size: %d, because there are %d training images", size, len(data.train))
        self.batch_size = size
        self.batches: Batches = train_loader(
            data, config.data, preprocessing, batch_size=size, seed=config.seed, device=device, views=views
        )
        size = max(2, min(128, size))  # fits in memory, because training does
        self.val = eval_loader(data, config.data, preprocessing, batch_size=size, device=device)
        every = -(-len(data.val) // config.eval_attack_images)
        self.val_attacked = eval_loader(data, config.data, preprocessing, batch_size=size, device=device, every=every)

    def _initial_state(self, preprocessing: Preprocessing) -> TrainState:
        config, data = self.config, self.data
        model: nn.Module = unwrap_model(self.task.trainable_module)
        ema = self.task.get_trainable_module(ema=True)
        self.updates_per_epoch = -(-len(self.batches) // config.optim.accumulate)
        optimizer = make_optimizer(config, model)
        scheduler = make_scheduler(config, optimizer, self.updates_per_epoch)
        return TrainState(
            config=config,
            spec=ModelSpec(
                arch=config.arch,
                classes=data.classes,
                wnids=data.wnids,
                preprocessing=preprocessing,
                dataset=data.name,
                recipe=config.recipe,
            ),
            model=model,
            ema=None if ema is None else unwrap_model(ema.module),
            optimizer=optimizer,
            scheduler=scheduler,
            scaler=torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16"),
            sample=make_sample(data, preprocessing),
            loss_sum=torch.zeros((), device=self.device),
            branch_loss_sums={},
            train_images=len(data.train),
            lr=config.resolved_lr,
        )

    def run(self) -> FitResult:
        """Train the remaining epochs."""
        resumed = self._resume()
        if rank() == 0:
            self.folder.start(self.config, self.data.split, self.state.changes, resumed=resumed)
            with preserve_rng():
                self.trackers = open_trackers(self.config, self.folder.path, self.state.step)
        try:
            with self.stop.listening():
                self._run_epochs()
        finally:
            for tracker in self.trackers:
                tracker.close()
            close_all(self.batches, self.val, self.val_attacked)
        best = self.folder.best_epoch or best_epoch(self.state.metrics)
        return FitResult(last=self.last, best=self.folder.best, best_epoch=best, metrics=tuple(self.state.metrics))

    def _run_epochs(self) -> None:
        epochs = self.config.resolved_epochs
        seconds: list[float] = []
        for epoch in range(self.state.epoch, epochs):
            began = time.monotonic()
            self._train_epoch()
            self._save()  # before validation, during which the run may be killed
            self.reporter.evaluating()
            row = self._validate()
            self.state.finish_epoch(row)
            self._save()
            self._publish()
            self._track(epoch_values(row))
            seconds.append(time.monotonic() - began)
            left = (epochs - epoch - 1) * sum(seconds) / len(seconds)
            self.reporter.epoch_ended(row, epochs, left)
            self.stop.share(self.device)
            if self.state.epoch < epochs:
                self._raise_if_stopped()

    def _train_epoch(self) -> None:
        """Train the rest of the current epoch."""
        state = self.state
        self.task.train()
        self.backbone.start_epoch(state.epoch)
        self.batches.start_at(state.epoch, state.batch)
        steps = len(self.batches) + state.batch
        accumulate = self.config.optim.accumulate
        self.reporter.epoch_started(state.epoch + 1, self.config.resolved_epochs, steps, state.batch)
        began = time.monotonic() - state.seconds
        for images, labels in self.batches:
            # The last group of an epoch may be smaller.
            group = min(accumulate, steps - state.batch // accumulate * accumulate)
            update = (state.batch + 1) % accumulate == 0 or state.batch + 1 == steps
            loss = self.step(images, labels, group=group, update=update)
            state.add_losses(loss, self.losses)
            self.first_bad = torch.where((self.first_bad < 0) & ~torch.isfinite(loss), state.batch, self.first_bad)
            state.batch += 1
            state.images += len(labels) * world_size()
            state.seconds = time.monotonic() - began
            readable = self.device.type == "cpu" or state.batch % _GPU_LOSS_INTERVAL == 0 or state.batch == steps
            if readable:
                self._check_finite()
            self.reporter.stepped(loss.item() if readable else None)
            if update and self.trackers and self._is_tracked(state.batch == steps):
                self._track({name: value.item() for name, value in self.losses.items()} | {"lr": state.lr})
            if update:
                self._save_if_due()
        state.seconds = time.monotonic() - began

    def step(self, images: torch.Tensor, labels: torch.Tensor, *, group: int, update: bool) -> torch.Tensor:
        """Add the gradients of one batch; update the weights if it is the last one of its group.

        Args:
            images: normalized images, as the loader yields them.
            labels: int64 labels, (N,).
            group: number of batches whose gradients are averaged for one update.
            update: whether this batch is the last one of its group.

        Returns:
            The loss of the batch, detached.
        """
        state = self.state
        with contextlib.nullcontext() if update else self.task.no_sync():
            result = self.task(images, labels)
            loss: torch.Tensor = result["loss"]
            self.losses = {name: value.detach() for name, value in result.items() if name.startswith("loss")}
            state.scaler.scale(loss / group).backward()  # type: ignore[no-untyped-call]
        if update:
            self.backbone.drop_gradients()
            state.lr = max(group["lr"] for group in state.optimizer.param_groups)
            if self.config.optim.clip_grad:
                state.scaler.unscale_(state.optimizer)
                nn.utils.clip_grad_norm_(state.model.parameters(), self.config.optim.clip_grad)
            state.scaler.step(state.optimizer)
            state.scaler.update()
            state.optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.scheduler.step_update(state.step - state.schedule_offset)
            self.task.update_ema(state.step)
        return loss.detach()

    def _validate(self) -> EpochMetrics:
        """Measure the weights that an export would use: the moving average, if enabled."""
        state = self.state
        if world_size() > 1 and not self.config.sync_bn:
            distribute_bn(state.model, world_size(), reduce=True)
        model = state.model if state.ema is None else state.ema
        batches = world_size() * max(1, state.batch)
        clean = measure_quality(model, self._until_stopped(self.val))
        return EpochMetrics(
            epoch=state.epoch + 1,
            step=state.step,
            lr=state.lr,
            loss=world_sum(state.loss_sum).item() / batches,
            branch_losses={name: world_sum(value).item() / batches for name, value in state.branch_loss_sums.items()},
            val_loss=clean.loss,
            top1=clean.top1,
            top1_attacked=accuracy(model, self._until_stopped(self.val_attacked), self.validation_attack),
            images_per_s=state.images / max(state.seconds, 1e-9),
            seconds=state.seconds,
        )

    def _until_stopped(self, batches: Batches) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches, but abort validation on a stop request: the epoch is saved already."""
        for batch in batches:
            if world_size() == 1:
                self._raise_if_stopped()
            yield batch

    def _is_tracked(self, last: bool) -> bool:
        """Return whether trackers record the last update; short epochs record their last one."""
        every = self.config.log_every
        return self.state.step % every == 0 or (last and self.updates_per_epoch < every)

    @preserve_rng()
    def _publish(self) -> None:
        """Write the files that are derived from `last.pt` at the end of an epoch."""
        if rank() == 0 and self.state.metrics:
            title = f"{self.config.arch}, {self.config.recipe}, {self.data.name}"
            self.folder.publish(self.state.metrics, title, self.state.save_weights)

    @preserve_rng()
    def _track(self, values: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(self.state.step, values)

    def _check_finite(self) -> None:
        bad = int(self.first_bad.item())
        if bad < 0:
            return
        saved = f"the last good checkpoint is {self.last}" if self.last.exists() else "no checkpoint was written yet"
        files = self.batches.names(bad)
        raise TrainingDiverged(
            f"the loss is not finite at epoch {self.state.epoch + 1}, batch {bad + 1}; {saved}. "
            f"Lower the learning rate (--lr, now {self.config.resolved_lr:g}), or check the images of this batch: "
            f"{', '.join(files[:4])}{f' and {len(files) - 4} more' if len(files) > 4 else ''}"
        )

    def _save(self) -> None:
        self._check_finite()
        self.state.save(self.last)

    def _save_if_due(self) -> None:
        """Save if a stop was requested or `save_every` steps have passed; raise if stopped."""
        every, step = self.config.save_every, self.state.step
        in_sync = world_size() == 1 or step % 10 == 0  # processes compare their signals rarely
        if in_sync:
            self.stop.share(self.device)
        stops = in_sync and self.stop.signal is not None
        if stops or (every and step % every == 0):
            self._save()
        if stops:
            self._raise_if_stopped()

    def _raise_if_stopped(self) -> None:
        if self.stop.signal is not None:
            raise Interrupted(
                f"stopped by {self.stop.signal.name} in epoch {self.state.epoch + 1} after step {self.state.step}; "
                f"saved in {self.last}. Run the same command with {self.folder.resume_option} to continue",
                130 if self.stop.signal == signal.SIGINT else 143,
            )

    def _resume(self) -> bool:
        """Restore the state of the checkpoint to resume; return whether there is one."""
        state, source = self.state, self.folder.source
        if source is None:
            if self.config.resume == "auto":
                log.info("nothing to resume in %s: starting a new run", self.folder.path)
            return False
        changes = state.load(source)
        if any(change.setting == "batch_size" for change in changes):
            state.batch = state.images // (self.batch_size * world_size())
        state.batch = min(state.batch, len(self.batches))  # images may have been removed
        if state.epoch >= self.config.resolved_epochs:
            log.info(
                "%s has finished its %d epochs: nothing is left to train; --epochs N trains up to N epochs",
                source,
                state.epoch,
            )
        else:
            log.info("resuming %s at epoch %d, step %d", source, state.epoch + 1, state.step)
        for change in changes:
            log.info("changed from epoch %d on: %s", state.epoch + 1, change)
        restart = self.restart_schedule
        if restart is None:
            restart = any(change.restarts_schedule for change in changes)
        if restart or any(change.affects_schedule for change in changes):
            state.reschedule(self.updates_per_epoch, len(self.batches), restart=restart)
        if rank() == 0:
            self.folder.adopt()
            self.folder.find_best(state.metrics, between_epochs=state.batch == 0)
        if source != self.last or changes:
            state.save(self.last)
        if state.batch == 0:
            self._publish()  # again, in case the run was killed before it
        return True
