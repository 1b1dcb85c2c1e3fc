"""The parts of a run, built from its TrainConfig: model, task, optimizer and sample images."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from runtime.errors import ConfigError, DataError, first_line
from runtime.preprocessing import decode_and_fit
from runtime.spec import Preprocessing
from train.attack import LinfPGD
from train.config import TrainConfig
from train.data import ImageData, choose_preprocessing
from train.distributed import synchronize_batch_norms, world_size
from train.models import (
    create_model,
    data_config,
    next_working_size,
    reset_classifier,
    to_channels_last,
    unsupported_size,
)
from train.recipes import Recipe
from train.task import AdvPropTask
from train.weights import initialize

__all__ = [
    "make_model",
    "make_optimizer",
    "make_preprocessing",
    "make_sample",
    "make_scheduler",
    "make_task",
    "model_arguments",
    "seed_everything",
]

log = logging.getLogger(__name__)

_SAMPLE_IMAGES = 64
_SAMPLE_BYTES = 8 << 20
_AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def seed_everything(seed: int) -> None:
    """Seed the random generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


def model_arguments(config: TrainConfig, classes: int) -> dict[str, Any]:
    """Return the keyword arguments of timm's create_model, as stored in the checkpoint."""
    arguments: dict[str, Any] = {"num_classes": classes}
    if config.drop:
        arguments["drop_rate"] = config.drop
    if config.drop_path:
        arguments["drop_path_rate"] = config.drop_path
    return arguments


def make_model(config: TrainConfig, recipe: Recipe, classes: Sequence[str], *, resumes: bool = False) -> nn.Module:
    """Create the network with its initial weights.

    Args:
        config: settings of the run.
        recipe: its recipe.
        classes: names of the classes.
        resumes: whether the weights of a checkpoint replace the initial ones. No file of weights is
            then read.

    Raises:
        ArchError: timm does not have the architecture.
        ConfigError: the recipe needs a checkpoint to start from, or there are two sources of weights.
        CheckpointError: the file of weights does not fit.
        BackendUnavailable: the pretrained weights cannot be downloaded.
    """
    if recipe.from_checkpoint and config.init_checkpoint is None:
        raise ConfigError(f"the recipe {config.recipe} starts from another run; add --weights runs/NAME/best.pt")
    if config.pretrained and config.init_checkpoint is not None:
        raise ConfigError(
            f"found --pretrained and --weights {config.init_checkpoint}; expected one source of weights",
            fix="remove --pretrained to start from the file",
        )
    pretrained = config.pretrained and not resumes
    model = create_model(config.arch, pretrained=pretrained, **model_arguments(config, len(classes)))
    if pretrained:
        published = getattr(model, "pretrained_cfg", {}).get("num_classes")
        new = published != len(classes)
        if new:
            reset_classifier(model)
        head = f"; the classifier starts from random weights, for {len(classes)} classes" if new else ""
        log.info("--pretrained: loaded timm's weights of %s%s", config.arch, head)
    if config.init_checkpoint is not None and not resumes:
        initialize(model, config.init_checkpoint, config.arch, classes, config.init_route)
    if config.bn_momentum is not None:
        for layer in model.modules():
            if isinstance(layer, _BatchNorm):
                layer.momentum = config.bn_momentum
    if config.sync_bn and world_size() > 1:
        synchronize_batch_norms(model)
    return model


def make_preprocessing(config: TrainConfig, data: ImageData, model: nn.Module) -> Preprocessing:
    """Choose an input size that the network accepts, and the crop.

    Raises:
        ConfigError: the architecture does not accept the requested size.
    """
    model_config = data_config(model)
    chosen = choose_preprocessing(data, config.data, model_config)
    size = chosen.height
    reason = unsupported_size(config.arch, size)
    larger = next_working_size(config.arch, size, max(model_config["input_size"][-1], 2 * size)) if reason else None
    if larger is None:
        return chosen
    if config.data.img_size is not None:
        raise ConfigError(
            f"--img-size {size}: {config.arch} does not accept images of {size} px ({reason}); the next size that "
            f"works is --img-size {larger}"
        )
    log.info(
        "input size: %d px, the smallest multiple of 32 px that %s accepts (at %d px: %s)",
        larger,
        config.arch,
        size,
        reason,
    )
    return choose_preprocessing(data, dataclasses.replace(config.data, img_size=larger), model_config)


def make_task(
    config: TrainConfig,
    recipe: Recipe,
    model: nn.Module,
    attack: LinfPGD,
    classes: int,
    device: torch.device,
    class_weights: torch.Tensor | None = None,
) -> AdvPropTask:
    """Create the training task: routed BatchNorms, losses, mixup, AMP, torch.compile and DDP.

    `class_weights`, (classes,), multiplies the losses of the images of each class.
    """
    if config.amp != "none" and device.type == "cpu":
        log.warning(
            "--amp %s is slower than FP32 on most CPUs, except with AVX512-BF16 or AMX, and torch's bfloat16 "
            "convolutions can return gradients that are not finite there; remove --amp to train in FP32",
            config.amp,
        )
    mixup = None
    if config.data.mixup or config.data.cutmix:
        mixup = Mixup(
            mixup_alpha=config.data.mixup,
            cutmix_alpha=config.data.cutmix,
            label_smoothing=config.optim.label_smoothing,
            num_classes=classes,
        )
    smoothing = config.optim.label_smoothing
    weighted = None
    if class_weights is not None:
        weighted = nn.CrossEntropyLoss(class_weights.to(device), label_smoothing=smoothing)
    task = AdvPropTask(
        to_channels_last(model.to(device)),
        recipe,
        attack,
        criterion=weighted,
        criterion_kwargs={"smoothing": smoothing} if weighted is None else None,
        mixup=mixup,
        amp_dtype=_AMP[config.amp],
        device=device,
    )
    if config.optim.ema_decay:
        task.setup_ema(decay=config.optim.ema_decay, use_warmup=True)
    if config.compile:
        task.compile()
    if world_size() > 1:
        ids = [device.index] if device.type == "cuda" else None
        task.prepare_distributed(device_ids=ids, broadcast_buffers=False)
    return task


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Create timm's optimizer.

    Raises:
        ConfigError: timm does not know it or rejects its options.
    """
    _try_optimizer(config)
    return _create_optimizer(config, model, config.optim.layer_decay)


def make_scheduler(
    config: TrainConfig, optimizer: torch.optim.Optimizer, updates_per_epoch: int, epochs: float | None = None
) -> Any:
    """Create timm's learning rate schedule, which is stepped at each update.

    Args:
        config: settings of the run.
        optimizer: its optimizer.
        updates_per_epoch: updates of an epoch.
        epochs: length of the schedule (default: that of the run).

    Raises:
        ConfigError: timm does not know it or rejects its options.
    """
    optim = config.optim
    epochs = config.resolved_epochs if epochs is None else epochs
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=optim.schedule,
            num_epochs=epochs,
            decay_epochs=optim.decay_epochs,
            decay_rate=optim.decay_rate,
            warmup_epochs=min(optim.warmup_epochs, epochs / 2),
            warmup_lr=config.resolved_lr / 100,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    except Exception as error:  # timm checks its arguments in many ways
        raise ConfigError(f"timm cannot create the schedule {optim.schedule!r}: {error}") from error
    if scheduler is None:
        raise ConfigError(f"timm has no schedule {optim.schedule!r}; use cosine, step, constant, …")
    scheduler.step_update(0)
    return scheduler


def _create_optimizer(config: TrainConfig, model: nn.Module, layer_decay: float | None) -> torch.optim.Optimizer:
    optim = config.optim
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        model,
        opt=optim.optimizer,
        lr=config.resolved_lr,
        weight_decay=optim.weight_decay,
        **({} if layer_decay is None else {"layer_decay": layer_decay}),
        **optim.options,
    )
    return optimizer


def _try_optimizer(config: TrainConfig) -> None:
    """Make one update of a tiny layer.

    Some optimizers need a GPU, second derivatives or other arguments, and fail in the first update
    only.
    """
    layer = nn.Linear(2, 2)
    optim = config.optim
    try:
        optimizer = _create_optimizer(config, layer, None)
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    except Exception as error:  # timm and torch check their arguments in many ways
        raise ConfigError(
            f"the optimizer {optim.optimizer!r} with {optim.options or 'its default options'} does not work here: "
            f"{first_line(error)}",
            fix="use another one, such as adamw, sgd or rmsproptf, or change optim.options",
        ) from error


def make_sample(data: ImageData, spec: Preprocessing) -> dict[str, torch.Tensor]:
    """Return validation images at the input size and their labels, for the verification of exports.

    Raises:
        DataError: none of the images can be decoded.
    """
    size = spec.height * spec.width * 3
    count = max(8, min(_SAMPLE_IMAGES, _SAMPLE_BYTES // size))
    images: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    labels: list[int] = []
    for image, label in data.val.probe(count):
        with contextlib.suppress(DataError):  # validation reports images that cannot be decoded
            images.append(decode_and_fit(image, spec))
            labels.append(label)
    if not images:
        raise DataError(f"none of {min(count, len(data.val))} validation images of {data.name} can be decoded")
    return {"images": torch.from_numpy(np.stack(images)), "labels": torch.tensor(labels)}
