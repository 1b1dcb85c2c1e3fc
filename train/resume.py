"""Resume a run with other settings: which settings may change, and what a change affects."""

from __future__ import annotations

import dataclasses
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import CheckpointError, ConfigError, first_line
from runtime.spec import ModelSpec
from train.checkpoint import load_checkpoint
from train.config import TrainConfig
from train.config_file import flatten, from_mapping, to_mapping

__all__ = [
    "Change",
    "changed_settings",
    "check_resumable",
    "check_spec",
    "find_checkpoint",
    "stored_config",
    "stored_settings",
    "with_values",
]

_NO_EFFECT = {
    *("out", "resume", "overwrite", "restart_schedule", "device", "compile", "save_every", "log_every"),
    *("tensorboard", "wandb", "data.root", "data.val", "data.workers", "data.download", "init_checkpoint"),
    *("init_route", "pretrained"),
}
"""Settings that do not affect what is learned after the run resumes."""

_NEW_SCHEDULE = {"optim.lr", "optim.schedule"}
_SCHEDULE = {
    *("epochs", "optim.warmup_epochs", "optim.decay_epochs", "optim.decay_rate", "batch_size", "optim.accumulate"),
    *_NEW_SCHEDULE,
}
"""Settings that the learning rate schedule depends on."""

_APPLIED = {
    *_SCHEDULE,
    *("optim.weight_decay", "optim.label_smoothing", "optim.clip_grad", "optim.ema_decay", "freeze_backbone"),
    *("attack.epsilon", "attack.steps", "attack.step_size", "attack.targeted", "attack.clean_start_share"),
    *("data.crop_scale", "data.auto_augment", "data.mixup", "data.cutmix", "data.hflip", "data.color_jitter"),
    *("data.balance", "amp", "drop", "drop_path", "bn_momentum", "sync_bn", "eval_attack_images"),
}
"""Settings that may change, and then affect the rest of the run."""

_ONE_CALL = ("out", "resume", "overwrite", "restart_schedule")
"""Settings of one call, which a resumed run does not inherit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A setting that changed when a run resumed."""

    epoch: int
    """Finished epochs at that time."""
    step: int
    """Updates at that time."""
    setting: str
    """Name of the field, with its section."""
    before: Any
    """Former value; None if the default applied."""
    after: Any
    """New value; None if the default applies."""

    def __str__(self) -> str:
        before, after = ("the default" if value is None else value for value in (self.before, self.after))
        return f"{self.setting}: {before} → {after}"

    @property
    def affects_schedule(self) -> bool:
        """Whether the learning rate schedule depends on the setting."""
        return self.setting in _SCHEDULE

    @property
    def restarts_schedule(self) -> bool:
        """Whether the schedule starts again, unless `restart_schedule` says otherwise."""
        return self.setting in _NEW_SCHEDULE


def find_checkpoint(resume: str, out: Path) -> Path | None:
    """Return the checkpoint that `TrainConfig.resume` selects, or None for a new run.

    Args:
        resume: `never`, `auto`, or the path of a `last.pt` or of its folder.
        out: the output folder.

    Raises:
        CheckpointError: the path does not exist.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return out / "last.pt" if (out / "last.pt").exists() else None
    path = Path(resume).expanduser()
    checkpoint = path / "last.pt" if path.is_dir() else path
    if not checkpoint.is_file():
        inside = ", ".join(sorted(file.name for file in path.iterdir())[:6]) if path.is_dir() else ""
        raise CheckpointError(
            f"cannot resume {resume}: {f'the folder has no last.pt (found {inside})' if inside else 'no such file'}",
            fix="pass the last.pt of a run, or its folder",
        )
    check_resumable(load_checkpoint(checkpoint, device="meta"), checkpoint)
    return checkpoint


def check_resumable(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError if a checkpoint holds weights only, as `best.pt` does."""
    if "optimizer" in checkpoint:
        return
    last = path.with_name("last.pt")
    raise CheckpointError(
        f"cannot resume {path}: it holds the weights of epoch {checkpoint['epoch']} without the state of the optimizer",
        fix=f"resume the last epoch with --resume {shlex.quote(str(last))}, or start a new run from these weights with "
        f"--weights {shlex.quote(str(path))} and another --out",
    )


def stored_settings(path: Path) -> dict[str, Any]:
    """Return the settings of the run that wrote a checkpoint, as nested dicts.

    Settings that belong to one call, such as the output folder, are not included.

    Raises:
        CheckpointError: it is not a checkpoint, or it is damaged.
    """
    text = load_checkpoint(path, device="meta").get("config")
    try:
        content = tomllib.loads(text)  # type: ignore[arg-type]  # reported as damaged
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"cannot resume {path}: it is damaged (config: {first_line(error)})") from error
    return {name: value for name, value in content.items() if name not in _ONE_CALL}


def stored_config(path: Path) -> TrainConfig:
    """Return the settings of the run that wrote a checkpoint.

    Raises:
        CheckpointError: it is not a checkpoint, it is damaged, or another version wrote it.
    """
    try:
        return from_mapping(stored_settings(path))
    except ConfigError as error:
        raise CheckpointError(
            f"cannot resume {path}: its settings are not those of this version of advprop: {error}",
            fix=f"start a new run from its weights: --weights {shlex.quote(str(path))}",
        ) from error


def changed_settings(checkpoint: Mapping[str, Any], path: Path, config: TrainConfig) -> list[Change]:
    """Return the settings that differ from those of a checkpoint and apply from now on.

    Args:
        checkpoint: its content.
        path: its file.
        config: the settings of the run that resumes.

    Raises:
        CheckpointError: a setting differs that a run cannot change.
    """
    content = tomllib.loads(checkpoint["config"])
    before = flatten(to_mapping(from_mapping({k: v for k, v in content.items() if k not in _ONE_CALL})))
    now = flatten(to_mapping(config))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name) and name not in _NO_EFFECT]
    fixed = [name for name in names if name not in _APPLIED and not name.startswith("attack.")]
    if fixed:
        found = "; ".join(f"{name}: {before.get(name)} → {now.get(name)}" for name in fixed)
        raise CheckpointError(
            f"cannot resume {path} with other settings of the network, its optimizer or its images ({found})",
            fix=_alternative(path, fixed, now),
        )
    epoch, batch = int(checkpoint["epoch"]), int(checkpoint["batch"])
    if "epochs" in names and config.resolved_epochs < epoch + bool(batch):
        raise CheckpointError(
            f"cannot resume {path} for {config.resolved_epochs} epochs: it has trained {epoch} epochs"
            f"{f' and {batch} batches' if batch else ''}",
            fix=f"use --epochs {epoch + bool(batch)} or more, or use its weights as they are",
        )
    step = int(checkpoint["step"])
    return [
        Change(epoch=epoch, step=step, setting=name, before=before.get(name), after=now.get(name)) for name in names
    ]


def check_spec(checkpoint: Mapping[str, Any], path: Path, spec: ModelSpec, *, may_move: bool) -> None:
    """Raise CheckpointError if the classes or the preprocessing differ from those of a checkpoint.

    Args:
        checkpoint: its content.
        path: its file.
        spec: the description of the network that resumes.
        may_move: whether the name of the dataset may differ: a folder can be renamed.
    """
    stored = ModelSpec.from_json(checkpoint["spec"], where=str(path))
    before, now = dataclasses.asdict(stored), dataclasses.asdict(spec)
    changed = [name for name in now if before[name] != now[name] and not (may_move and name == "dataset")]
    if changed:
        found = "; ".join(f"{name}: {str(before[name])[:80]} → {str(now[name])[:80]}" for name in changed)
        raise CheckpointError(
            f"cannot resume {path} with other images or another input ({found})", fix=_alternative(path, (), {})
        )


def _alternative(path: Path, fixed: Sequence[str], now: Mapping[str, Any]) -> str:
    """Return advice: a command that starts a new run from the weights of this one."""
    if "arch" in fixed:
        return "weights of another architecture cannot be used: choose another --out for a new run"
    config = path.with_name("config.toml")
    settings = [f"--set {shlex.quote(f'{name}={now[name]}')}" for name in fixed if name in now]
    command = ["python -m train.run", f"--config {shlex.quote(str(config))}", f"--weights {shlex.quote(str(path))}"]
    new = path.parent.with_name(f"{path.parent.name}-2")
    return (
        "start a new run from its weights: "
        f"{' '.join([*command, *settings, f'--resume never --out {shlex.quote(str(new))}'])}"
    )


def with_values(config: TrainConfig, source: Path | None) -> TrainConfig:
    """Return the settings with the learning rate that applies, for the run's record.

    Args:
        config: the settings that were requested.
        source: the checkpoint that the run resumes, or None.
    """
    lr = config.resolved_lr if source is None or config.optim.lr is not None else stored_config(source).resolved_lr
    return dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, lr=lr),
        resume=config.resume if config.resume in ("auto", "never") else "auto",
        restart_schedule=None,
    )
