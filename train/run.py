"""`python -m train.run`: train a robust classifier with AdvProp."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from runtime.errors import CheckpointError, ConfigError
from runtime.system.command import Command, Option
from runtime.system.console import print_lines, set_up_logging
from train.timm_options import timm_options, timm_settings

_Function = TypeVar("_Function", bound=Callable[..., Any])

LAST = "last"
"""Value of --resume without a path."""

EXAMPLES = """
Examples:
  python -m train.run --arch efficientnet_b3                  the digits of scikit-learn
  python -m train.run --arch resnet50 --data ~/imagenet       train/CLASS/IMAGE, val/CLASS/IMAGE
  python -m train.run --arch resnet50 --data ~/photos         CLASS/IMAGE; a fifth is for validation
  python -m train.run --arch resnet50 --data ~/photos --weights resnet50.safetensors --epochs 10
  python -m train.run --resume runs/resnet50                  continue a run
  python -m train.run --resume runs/resnet50 --epochs 200     continue it for longer
  python -m train.run --arch resnet18 --dataset torch/cifar10 --data ~/cifar --set data.download=true
  python -m train.run --arch efficientnet_b3 --data ~/imagenet --preset paper
  python -m train.run --arch resnet18 --recipe vanilla        the baseline without AdvProp
  python -m train.run --config runs/resnet18/config.toml --set optim.ema_decay=0.999
  torchrun --nproc-per-node 4 -m train.run --arch resnet50 --data ~/imagenet

All other settings are fields of TrainConfig (train/config.py): use --set FIELD=VALUE or a TOML file.
Precedence: options, then --set, --config, --preset and the defaults. A run that resumes keeps its
settings, except those that you pass.
"""

OPTIONS = {  # option → field
    "arch": "arch",
    "root": "data.root",
    "dataset": "data.dataset",
    "recipe": "recipe",
    "epsilon": "attack.epsilon",
    "attack_steps": "attack.steps",
    "weights": "init_checkpoint",
    "freeze_backbone": "freeze_backbone",
    "layer_decay": "optim.layer_decay",
    "val_data": "data.val",
    "val_share": "data.val_share",
    "restart_schedule": "restart_schedule",
    "epochs": "epochs",
    "batch_size": "batch_size",
    "img_size": "data.img_size",
    "lr": "optim.lr",
    "seed": "seed",
    "workers": "data.workers",
    "amp": "amp",
    "pretrained": "pretrained",
    "device": "device",
    "out": "out",
    "resume": "resume",
    "overwrite": "overwrite",
}


def _option(group: str, *names: str, **attributes: Any) -> Callable[[_Function], _Function]:
    return click.option(*names, cls=Option, group=group, **attributes)


@click.command("train", cls=Command, epilog=EXAMPLES)
@_option("", "--arch", former=["--model"], metavar="NAME", help="Architecture, by its timm name.")
@_option(
    "",
    "--data",
    "root",
    former=["--data-dir"],
    metavar="PATH",
    help="Folder with train/CLASS/IMAGE and val/CLASS/IMAGE, or their tar files; a folder with CLASS/IMAGE; or a CSV "
    "or JSON-lines file of paths and labels (default: the digits of scikit-learn).",
)
@_option(
    "",
    "--val-data",
    metavar="PATH",
    help="Validation images: a folder with CLASS/IMAGE, or a list (default: those of --data).",
)
@_option(
    "",
    "--val-share",
    type=float,
    help="Share of each class for validation if there are no validation images (default: 0.2).",
)
@_option(
    "",
    "--dataset",
    metavar="NAME",
    help="Dataset, by its timm name, such as torch/cifar10; --data is the folder that stores it.",
)
@_option(
    "",
    "--recipe",
    metavar="NAME",
    help="Recipe: advprop, vanilla, adversarial, shared-bn, shared-statistics, finetune, fine-grained or fast "
    "(default: advprop).",
)
@_option(
    "",
    "--preset",
    type=click.Choice(["paper"]),
    help="Published settings of EfficientNet-B0 to B8 and ResNet-50/101/152/200.",
)
@_option(
    "",
    "--weights",
    former=["--initial-checkpoint"],
    metavar="FILE",
    help="Weights to start from: a checkpoint, or a state dict as .pt, .pth or .safetensors.",
)
@_option(
    "", "--pretrained", is_flag=True, default=None, help="Start from timm's pretrained weights, which are downloaded."
)
@_option(
    "",
    "-o",
    "--out",
    former=["--output"],
    metavar="DIR",
    help="Folder for checkpoints (default: runs/ARCH, or runs/ARCH-RECIPE).",
)
@_option("Training", "--epsilon", type=float, help="Attack strength, in 1/255 (default: 1).")
@_option("Training", "--attack-steps", type=int, help="PGD steps (default: ε + 1, but 1 if ε = 1).")
@_option("Training", "--epochs", type=int, help="Passes over the training images (default: 100; 8 on the digits).")
@_option(
    "Training",
    "-b",
    "--batch-size",
    type=int,
    help="Clean images per step and process (default: 64; 128 up to 64 px; 32 on the digits; less for few images).",
)
@_option(
    "Training",
    "--img-size",
    type=int,
    metavar="PIXELS",
    help="Input size (default: the architecture's own, or less if the images are smaller).",
)
@_option("Training", "--lr", type=float, help="Peak learning rate (default: 3e-3, or 5e-4 from weights).")
@_option("Training", "--seed", type=int, help="Seed of all random numbers (default: 0).")
@_option(
    "Training",
    "--freeze-backbone",
    type=int,
    metavar="EPOCHS",
    help="Epochs at the start in which only the classifier is trained (default: 0).",
)
@_option(
    "Training",
    "--layer-decay",
    type=float,
    help="Factor of the learning rate from one layer to the layer before it, such as 0.75 (default: 1).",
)
@_option("Execution", "-j", "--workers", type=int, help="Processes that load images (default: by number of cores).")
@_option("Execution", "--amp", type=click.Choice(["none", "bf16", "fp16"]), help="Mixed precision (default: none).")
@_option("Execution", "--device", help="Device: cpu, cuda, cuda:1, … (default: a GPU if available).")
@_option(
    "Execution",
    "--resume",
    is_flag=False,
    flag_value=LAST,
    metavar="[PATH]",
    help="Continue the run in PATH, a last.pt or its folder. Without PATH: the run in the output folder, or in the "
    "default one if --out is a new folder. auto: the run in the output folder if there is one. never: a new run.",
)
@_option(
    "Execution",
    "--restart-schedule/--extend-schedule",
    default=None,
    help="With --resume: start the learning rate schedule again, or continue as if the run had started with these "
    "settings (default: start again if --lr or the kind of schedule changes).",
)
@_option(
    "Execution",
    "--overwrite",
    is_flag=True,
    default=None,
    help="Start a new run in a folder that holds another run, and delete that run.",
)
@_option(
    "Settings",
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML file of settings. The config.toml of a run reproduces the run.",
)
@_option(
    "Settings",
    "--set",
    "settings",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Any field of TrainConfig, such as optim.weight_decay=1e-5. Repeatable.",
)
@click.argument("unexpected", nargs=-1, metavar="")
@timm_options
def main(
    preset: str | None, config_path: Path | None, settings: tuple[str, ...], unexpected: tuple[str, ...], **options: Any
) -> None:
    """Train a classifier on clean and adversarial images together (AdvProp).

    Clean and adversarial images use separate BatchNorms; only the clean one is used for inference.
    Writes last.pt, best.pt, metrics.csv, curves.png and config.toml. Ctrl-C saves the state before
    the run ends; --resume continues from it.
    """
    console = set_up_logging()
    from train.config_file import from_mapping, merge, parse_setting, read_toml

    _check_unexpected(unexpected)
    from_timm = timm_settings(options)
    given = [
        *([read_toml(config_path)] if config_path else []),
        *(parse_setting(text) for text in settings),
        *from_timm,
        *(_nested(OPTIONS[name], value) for name, value in options.items() if value is not None),
    ]
    content = merge({}, *given)
    base = _settings_to_continue(content)
    if "arch" not in base and "arch" not in content and content.get("init_checkpoint"):
        base = _architecture_of(Path(str(content["init_checkpoint"])))
    if preset:
        from train.presets import paper

        together = merge(base, content)
        base = merge(base, paper(together.get("arch", ""), together.get("batch_size") or 256))
    config = from_mapping(merge(base, content))
    from train.loop import fit
    from train.reporting import RichReporter, SilentReporter, summary_table

    result = fit(config, RichReporter(console) if _is_first_process() else SilentReporter())
    if not _is_first_process():
        return
    console.print(summary_table(f"{config.arch}, {config.recipe}", result.best_epoch, result.metrics))
    files = "last.pt, best.pt, metrics.csv, curves.png, config.toml" + (", tensorboard/" if config.tensorboard else "")
    lines = [f"next: advprop-export {shlex.quote(str(result.best))} --trt fp16"]
    validation = result.last.parent / "split" / "val"
    if (result.last.parent / "split.csv").exists() and validation.is_dir():
        files += ", split.csv, split/"
        lines.append(
            f"evaluate: advprop eval {shlex.quote(str(result.best))} --suite corruptions "
            f"--data {shlex.quote(str(validation))}"
        )
    print_lines(console, [f"in {result.last.parent}: {files}", *lines])


def _nested(field: str, value: object) -> dict[str, Any]:
    section, _, name = field.rpartition(".")
    return {section: {name: value}} if section else {name: value}


def _check_unexpected(arguments: Sequence[str]) -> None:
    """Answer arguments that are not options, such as timm's folder and Ultralytics' NAME=VALUE.

    Raises:
        ConfigError: there is one.
    """
    if not arguments:
        return
    name, equals, value = arguments[0].partition("=")
    name = {"imgsz": "img-size", "batch": "batch-size", "model": "arch", "lr0": "lr", "project": "out"}.get(name, name)
    known = {option.replace("_", "-").replace("root", "data") for option in OPTIONS}
    if equals:
        fix = f"use --{name} {value}" if name in known else f"use --set {name}={value}"
    else:
        fix = f"use --data {shlex.quote(arguments[0])} for a folder of images"
    raise ConfigError(f"unexpected argument {arguments[0]!r}", fix=fix)


def _settings_to_continue(content: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the run that `content` resumes, or none for a new run.

    The paths of the run are written to `content`.

    Raises:
        CheckpointError: the run cannot be resumed.
        ConfigError: there is no run to resume.
    """
    from train.resume import find_checkpoint, stored_settings

    resume = str(content.get("resume", "never"))
    if resume == "never":
        return {}
    default = _default_folder(content)
    out = Path(str(content["out"])).expanduser() if content.get("out") else default
    if resume not in (LAST, "auto"):
        source = find_checkpoint(resume, Path())
        out = out if content.get("out") or source is None else source.parent
    elif out is None:
        raise ConfigError("--resume states no run", fix="pass its folder, such as --resume runs/resnet50")
    else:
        source = find_checkpoint("auto", out)
        if source is None and resume == LAST and default is not None:
            source = find_checkpoint("auto", default)
        content["resume"] = "auto" if source is None or source.parent == out else str(source)
    if source is None:
        return {}
    content["out"] = str(out)
    return stored_settings(source)


def _default_folder(content: dict[str, Any]) -> Path | None:
    """Return the output folder of these settings without --out, if they name an architecture."""
    if "arch" not in content:
        return None
    recipe = content.get("recipe", "advprop")
    return Path("runs") / (content["arch"] if recipe == "advprop" else f"{content['arch']}-{recipe}")


def _architecture_of(path: Path) -> dict[str, Any]:
    """Return the architecture of a checkpoint of ours as a setting; nothing for other files."""
    from train.checkpoint import load_checkpoint

    try:
        return {"arch": load_checkpoint(path, device="meta")["arch"]}
    except CheckpointError:  # reported when the weights are read
        return {}


def _is_first_process() -> bool:
    """Return whether this is the only process, or torchrun's first one."""
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    main()
