"""Options of timm's train.py that `advprop train` understands, and answers to the others.

They are not in the help. Those with a counterpart set its field; the log names the field. The
others end with an error that states what to do instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import click

from runtime.errors import ConfigError
from train.config_file import parse_setting

__all__ = ["timm_options", "timm_settings"]

log = logging.getLogger(__name__)

_FIELDS = {
    "--opt": "optim.optimizer",
    "--sched": "optim.schedule",
    "--weight-decay": "optim.weight_decay",
    "--warmup-epochs": "optim.warmup_epochs",
    "--decay-epochs": "optim.decay_epochs",
    "--decay-rate": "optim.decay_rate",
    "--clip-grad": "optim.clip_grad",
    "--momentum": "optim.options.momentum",
    "--opt-eps": "optim.options.eps",
    "--smoothing": "optim.label_smoothing",
    "--grad-accum-steps": "optim.accumulate",
    "--model-ema-decay": "optim.ema_decay",
    "--drop": "drop",
    "--drop-path": "drop_path",
    "--bn-momentum": "bn_momentum",
    "--aa": "data.auto_augment",
    "--mixup": "data.mixup",
    "--cutmix": "data.cutmix",
    "--hflip": "data.hflip",
    "--color-jitter": "data.color_jitter",
    "--train-split": "data.train_split",
    "--val-split": "data.val_split",
    "--input-key": "data.input_key",
    "--target-key": "data.target_key",
    "--wandb-project": "wandb",
}
"""Option of timm with a value → field of TrainConfig."""

_FLAGS = {
    "--model-ema": "optim.ema_decay=0.9998",  # timm's default decay
    "--dataset-download": "data.download=true",
    "--torchcompile": "compile=true",
    "--sync-bn": "sync_bn=true",
}
"""Flag of timm → the setting that it stands for here."""

_ANSWERS = {
    "--num-classes": "the number of classes is that of the images; remove it",
    "--min-lr": "the schedules end at 0; remove it",
    "--warmup-lr": "warm-up starts at 1% of --lr; remove it, or set --set optim.warmup_epochs=N",
    "--cooldown-epochs": "there is no cool-down; remove it",
    "--reprob": "random erasing is not available; use --set data.cutmix=1.0 or --set data.auto_augment=rand-m9-mstd0.5",
    "--scale": "use --set data.crop_scale=[0.08,1.0]",
    "--input-size": "use --img-size PIXELS",
    "--experiment": "use --out DIR",
    "--eval-metric": "best.pt is the epoch with the best clean accuracy; remove it",
    "--checkpoint-hist": "last.pt and best.pt are kept; remove it",
}
"""Option of timm without a counterpart → what to do."""

_PREFIX = "timm_"


def timm_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command, as hidden ones."""
    for names, settings in ((_FIELDS, {}), (_FLAGS, {"is_flag": True, "default": None}), (_ANSWERS, {})):
        for name in names:
            command = click.option(name, _parameter(name), hidden=True, **settings)(command)  # type: ignore[arg-type]
    return command


def timm_settings(options: dict[str, Any]) -> list[Mapping[str, Any]]:
    """Remove timm's options from the values of all options, and return them as nested settings.

    Raises:
        ConfigError: an option has no counterpart; the message states what to do.
    """
    found: list[Mapping[str, Any]] = []
    for name in (*_FLAGS, *_FIELDS, *_ANSWERS):
        value = options.pop(_parameter(name))
        if value is None or value is False:
            continue
        if name in _ANSWERS:
            raise ConfigError(f"{name} is an option of timm's train.py without a counterpart here: {_ANSWERS[name]}")
        setting = _FLAGS.get(name) or f"{_FIELDS[name]}={value}"
        log.info("%s is --set %s here", name, setting)
        found.append(parse_setting(setting))
    return found


def _parameter(option: str) -> str:
    return _PREFIX + option.strip("-").replace("-", "_")
