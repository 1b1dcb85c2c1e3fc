"""`python -m train.run`: train a robust classifier with AdvProp."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from runtime.system.console import cli_errors, set_up_logging

EXAMPLES = """\b
Examples:
  python -m train.run --arch efficientnet_b3                  the embedded digits
  python -m train.run --arch resnet50 --data ~/imagenet       train/CLASS/*, val/CLASS/*
  python -m train.run --arch resnet50 --data ~/imagenet --resume
  python -m train.run --arch resnet18 --dataset torch/cifar10 --data ~/cifar --set data.download=true
  python -m train.run --arch efficientnet_b3 --data ~/imagenet --preset paper
  python -m train.run --arch resnet18 --recipe vanilla        the baseline without AdvProp
  python -m train.run --config runs/resnet18/config.toml --set optim.ema_decay=0.999
  torchrun --nproc-per-node 4 -m train.run --arch resnet50 --data ~/imagenet

\b
Settings without an option of their own are fields of train/config.py: --set FIELD=VALUE,
or a TOML file. Order of precedence: options, --set, --config, --preset, defaults.
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


@click.command("train", epilog=EXAMPLES)
@click.option("--arch", metavar="NAME", help="timm's name of the architecture.")
@click.option(
    "--data",
    "root",
    metavar="DIR",
    help="Folder with train/CLASS/ and val/CLASS/, or tar files of them.  [default: the embedded digits]",
)
@click.option(
    "--dataset", metavar="NAME", help="A data set by timm's name, e.g. torch/cifar10; --data is where it is kept."
)
@click.option(
    "--recipe",
    metavar="NAME",
    help="advprop, vanilla, adversarial, shared-bn, finetune, fine-grained or fast.  [default: advprop]",
)
@click.option(
    "--preset",
    type=click.Choice(["paper"]),
    help="The published settings of EfficientNet-B0…B8, ResNet-50/101/152/200.",
)
@click.option("--epsilon", type=float, help="Attack strength, in 1/255.  [default: 1]")
@click.option("--attack-steps", type=int, help="PGD steps.  [default: ε + 1, one at ε = 1]")
@click.option("--epochs", type=int, help="Passes over the data.  [default: 8 on the digits, else 100]")
@click.option(
    "--batch-size",
    type=int,
    help="Clean images a step and process.  [default: 32 on the digits, 128 up to 64 px, else 64]",
)
@click.option(
    "--img-size", type=int, metavar="PIXELS", help="Input size.  [default: the model's, less for small images]"
)
@click.option("--lr", type=float, help="Peak learning rate.  [default: 3e-3]")
@click.option("--seed", type=int, help="Seeds everything.  [default: 0]")
@click.option("--workers", type=int, help="Loader processes.  [default: by cores]")
@click.option("--amp", type=click.Choice(["none", "bf16", "fp16"]), help="Mixed precision.  [default: none]")
@click.option("--pretrained", is_flag=True, default=None, help="Start from timm's pretrained weights (a download).")
@click.option("--device", help="cpu, cuda, cuda:1, …  [default: CUDA where it is]")
@click.option(
    "--out", metavar="DIR", help="Where checkpoints go.  [default: runs/ARCH, runs/ARCH-RECIPE for another recipe]"
)
@click.option(
    "--resume",
    is_flag=False,
    flag_value="auto",
    type=click.Choice(["auto", "never"]),
    help="Continue from last.pt in the output folder, where there is one.",
)
@click.option("--overwrite", is_flag=True, default=None, help="Start anew where another run's last.pt is, and lose it.")
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Settings as TOML; config.toml of a run repeats it.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Any setting, e.g. optim.weight_decay=1e-5. Repeatable.",
)
@cli_errors
def main(preset: str | None, config_path: Path | None, settings: tuple[str, ...], **options: Any) -> None:
    """Train a classifier on clean and adversarial images together (AdvProp).

    Each kind goes through its own BatchNorm; the clean one is used afterwards. Writes
    last.pt, best.pt, metrics.csv, curves.png and config.toml. Ctrl-C saves first; --resume goes on
    from there.
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

    result = fit(config, RichReporter(console) if _is_first() else SilentReporter())
    if not _is_first():
        return
    console.print(summary_table(config.arch, config.recipe, result.metrics))
    console.print(
        f"in {result.last.parent}: last.pt, best.pt, metrics.csv, curves.png, config.toml"
        f"{', tensorboard/' if config.tensorboard else ''}\n"
        f"next: advprop-export {result.best} --trt fp16",
        highlight=False,
        soft_wrap=True,
    )


def _nested(field: str, value: object) -> dict[str, Any]:
    section, _, name = field.rpartition(".")
    return {section: {name: value}} if section else {name: value}


def _is_first() -> bool:
    """Whether this is torchrun's first process, or the only one."""
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    main()
