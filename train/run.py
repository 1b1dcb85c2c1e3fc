"""`python -m train.run`: train a robust classifier with AdvProp."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from runtime.system.command import Command, Option
from runtime.system.console import print_lines, set_up_logging

_Function = TypeVar("_Function", bound=Callable[..., Any])

EXAMPLES = """
Examples:
  python -m train.run --arch efficientnet_b3                  the digits of scikit-learn
  python -m train.run --arch resnet50 --data ~/imagenet       train/CLASS/IMAGE, val/CLASS/IMAGE
  python -m train.run --arch resnet50 --data ~/imagenet --resume
  python -m train.run --arch resnet18 --dataset torch/cifar10 --data ~/cifar --set data.download=true
  python -m train.run --arch efficientnet_b3 --data ~/imagenet --preset paper
  python -m train.run --arch resnet18 --recipe vanilla        the baseline without AdvProp
  python -m train.run --config runs/resnet18/config.toml --set optim.ema_decay=0.999
  torchrun --nproc-per-node 4 -m train.run --arch resnet50 --data ~/imagenet

All other settings are fields of TrainConfig (train/config.py): use --set FIELD=VALUE or a TOML file.
Precedence: options, then --set, --config, --preset and the defaults.
"""

OPTIONS = {  # option → field
    "arch": "arch",
    "root": "data.root",
    "dataset": "data.dataset",
    "recipe": "recipe",
    "epsilon": "attack.epsilon",
    "attack_steps": "attack.steps",
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
@_option("", "--arch", metavar="NAME", help="Architecture, by its timm name.")
@_option(
    "",
    "--data",
    "root",
    metavar="DIR",
    help="Folder with train/CLASS/IMAGE and val/CLASS/IMAGE, or their tar files (default: the digits of scikit-learn).",
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
    help="Recipe: advprop, vanilla, adversarial, shared-bn, finetune, fine-grained or fast (default: advprop).",
)
@_option(
    "",
    "--preset",
    type=click.Choice(["paper"]),
    help="Published settings of EfficientNet-B0 to B8 and ResNet-50/101/152/200.",
)
@_option("", "-o", "--out", metavar="DIR", help="Folder for checkpoints (default: runs/ARCH, or runs/ARCH-RECIPE).")
@_option("Training", "--epsilon", type=float, help="Attack strength, in 1/255 (default: 1).")
@_option("Training", "--attack-steps", type=int, help="PGD steps (default: ε + 1, but 1 if ε = 1).")
@_option("Training", "--epochs", type=int, help="Passes over the training images (default: 100; 8 on the digits).")
@_option(
    "Training",
    "--batch-size",
    type=int,
    help="Clean images per step and process (default: 64; 128 up to 64 px; 32 on the digits).",
)
@_option(
    "Training",
    "--img-size",
    type=int,
    metavar="PIXELS",
    help="Input size (default: the architecture's own, or less if the images are smaller).",
)
@_option("Training", "--lr", type=float, help="Peak learning rate (default: 3e-3).")
@_option("Training", "--seed", type=int, help="Seed of all random numbers (default: 0).")
@_option("Training", "--pretrained", is_flag=True, default=None, help="Download timm's pretrained weights.")
@_option("Execution", "--workers", type=int, help="Processes that load images (default: by number of cores).")
@_option("Execution", "--amp", type=click.Choice(["none", "bf16", "fp16"]), help="Mixed precision (default: none).")
@_option("Execution", "--device", help="Device: cpu, cuda, cuda:1, … (default: a GPU if available).")
@_option(
    "Execution",
    "--resume",
    is_flag=False,
    flag_value="auto",
    type=click.Choice(["auto", "never"]),
    help="Continue from last.pt in the output folder, if it exists.",
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
def main(preset: str | None, config_path: Path | None, settings: tuple[str, ...], **options: Any) -> None:
    """Train a classifier on clean and adversarial images together (AdvProp).

    Clean and adversarial images use separate BatchNorms; only the clean one is used for inference.
    Writes last.pt, best.pt, metrics.csv, curves.png and config.toml. Ctrl-C saves the state before
    the run ends; --resume continues from it.
    """
    console = set_up_logging()
    from train.config_file import from_mapping, merge, parse_setting, read_toml

    given = [
        *([read_toml(config_path)] if config_path else []),
        *(parse_setting(text) for text in settings),
        *(_nested(OPTIONS[name], value) for name, value in options.items() if value is not None),
    ]
    content = merge({}, *given)
    if preset:
        from train.presets import paper

        content = merge(paper(content.get("arch", ""), content.get("batch_size") or 256), content)
    config = from_mapping(content)
    from train.loop import fit
    from train.reporting import RichReporter, SilentReporter, summary_table

    result = fit(config, RichReporter(console) if _is_first_process() else SilentReporter())
    if not _is_first_process():
        return
    console.print(summary_table(f"{config.arch}, {config.recipe}", result.best_epoch, result.metrics))
    files = "last.pt, best.pt, metrics.csv, curves.png, config.toml" + (", tensorboard/" if config.tensorboard else "")
    print_lines(
        console,
        [f"in {result.last.parent}: {files}", f"next: advprop-export {shlex.quote(str(result.best))} --trt fp16"],
    )


def _nested(field: str, value: object) -> dict[str, Any]:
    section, _, name = field.rpartition(".")
    return {section: {name: value}} if section else {name: value}


def _is_first_process() -> bool:
    """Return whether this is the only process, or torchrun's first one."""
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    main()
