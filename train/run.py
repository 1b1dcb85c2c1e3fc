"""`python -m train.run`: train a robust classifier with AdvProp."""

from __future__ import annotations

from pathlib import Path

import click

from runtime.console import cli_errors, set_up_logging

EXAMPLES = """\b
Examples:
  python -m train.run --arch efficientnet_b3                  the embedded digits
  python -m train.run --arch resnet50 --data ~/imagenet       train/CLASS/*, val/CLASS/*
  python -m train.run --arch resnet50 --data ~/imagenet --resume
  python -m train.run --arch resnet18 --recipe vanilla        the baseline without AdvProp
"""


@click.command("train", epilog=EXAMPLES)
@click.option("--arch", required=True, metavar="NAME", help="timm's name of the architecture.")
@click.option(
    "--data",
    "root",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder with train/CLASS/ and val/CLASS/.  [default: the embedded digits]",
)
@click.option(
    "--recipe", default="advprop", show_default=True, metavar="NAME", help="vanilla, adversarial, shared-bn or advprop."
)
@click.option("--epsilon", default=1.0, show_default=True, help="Attack strength, in 1/255.")
@click.option("--attack-steps", type=int, help="PGD steps.  [default: ε + 1, one at ε = 1]")
@click.option("--epochs", type=int, help="Passes over the data.  [default: 8 on the digits, else 100]")
@click.option(
    "--batch-size", type=int, help="Clean images a step.  [default: 32 on the digits, 128 up to 64 px, else 64]"
)
@click.option(
    "--img-size", type=int, metavar="PIXELS", help="Input size.  [default: the model's, less for small images]"
)
@click.option("--lr", default=3e-3, show_default=True, help="Peak learning rate.")
@click.option("--seed", default=0, show_default=True, help="Seeds everything.")
@click.option("--workers", type=int, help="Loader processes.  [default: by cores]")
@click.option("--pretrained", is_flag=True, help="Start from timm's pretrained weights (a download).")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Where checkpoints go.  [default: runs/ARCH]"
)
@click.option("--resume", is_flag=True, help="Continue from last.pt in the output folder.")
@cli_errors
def main(
    arch: str,
    root: Path | None,
    recipe: str,
    epsilon: float,
    attack_steps: int | None,
    epochs: int | None,
    batch_size: int | None,
    img_size: int | None,
    lr: float,
    seed: int,
    workers: int | None,
    pretrained: bool,
    device: str,
    out: Path | None,
    resume: bool,
) -> None:
    """Train a classifier on clean and adversarial images together (AdvProp).

    Each kind goes through its own BatchNorm; the clean one is used afterwards. Writes
    last.pt, best.pt and metrics.csv. Ctrl-C saves first; --resume goes on from there.
    """
    console = set_up_logging()
    from train.config import AttackConfig, DataConfig, OptimConfig, TrainConfig

    config = TrainConfig(
        arch=arch,
        recipe=recipe,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        device=device,
        pretrained=pretrained,
        out=out,
        resume=resume,
        attack=AttackConfig(epsilon=epsilon, steps=attack_steps),
        data=DataConfig(root=root, img_size=img_size, workers=workers),
        optim=OptimConfig(lr=lr),
    )
    from train.loop import fit
    from train.reporting import RichReporter

    result = fit(config, RichReporter(console))
    best = max(result.metrics, key=lambda row: row.top1)
    console.print(
        f"best epoch {best.epoch}: clean {best.top1:.1%}, under attack {best.top1_attacked:.1%}\n"
        f"wrote {result.last}, {result.best} and {result.last.with_name('metrics.csv')}\n"
        f"next: advprop-export {result.best} --trt fp16",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
