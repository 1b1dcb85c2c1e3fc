"""Train recipes at CIFAR scale, measure them and their exported files, and write a report.

    python -m benchmarks.fidelity --data cifar10 --images 5000 --epochs 40      a fixed size
    python -m benchmarks.fidelity --data cifar10 --budget-hours 24              a size that fits a day
    python -m benchmarks.fidelity --data cifar10 --device cuda --arch cifar_resnet18 \\
        --images 50000 --epochs 100 --tuning-epochs 20 --amp bf16 --main-only   full size, on a GPU
    python -m benchmarks.fidelity --report fidelity.md                          a page of the results so far
    python -m benchmarks.fidelity --data cifar10 --images 5000 --run advprop:1  one run, and its hash

DATA is a folder with train/CLASS/IMAGE and val/CLASS/IMAGE. The study chooses learning rate, weight
decay and ε for vanilla and AdvProp with nine trials each, on held-out training images. Then it trains
every recipe, measures the last checkpoints on the test images, exports vanilla and AdvProp, and
measures their files. It writes every result as soon as it exists: repeat the command to resume.
Several processes with the same command share the work.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import timm
import torch

from benchmarks.fidelity import network  # noqa: F401  # registers the architectures
from benchmarks.fidelity.plan import MAIN_RECIPES, OTHER_RECIPES, Plan, cost
from benchmarks.fidelity.report import write_report
from benchmarks.fidelity.study import Study, StudyConfig
from runtime.errors import AdvPropError, ConfigError
from runtime.system.console import set_up_logging

SIZES = (2_500, 5_000, 10_000, 45_000)
"""Training images of the comparison over data size."""
_AFFORDABLE = ((2_500, 40), (5_000, 40), (10_000, 40), (45_000, 60))
"""(training images, epochs) that a budget chooses from."""
_MEASURING_H = 10.0
"""Time of all measurements, in hours."""


def affordable(hours: float, arch: str, tuning_epochs: int, seeds: int) -> tuple[int, int]:
    """Return the largest size whose main comparison fits the budget, by the time of a few steps."""
    model = timm.create_model(arch, num_classes=10).to(memory_format=torch.channels_last)
    images_NCHW = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last)
    for _ in range(2):
        model(images_NCHW).sum().backward()
    began = time.process_time()
    for _ in range(5):
        model(images_NCHW).sum().backward()
    seconds = (time.process_time() - began) / 5 / 128
    epsilon = 2.0
    runs = seeds * sum(cost(recipe, epsilon) for recipe in MAIN_RECIPES)
    runs += sum(cost(recipe, epsilon) for recipe in OTHER_RECIPES)
    tuning = 9 + 3 * sum(cost("advprop", epsilon) for epsilon in (1.0, 2.0, 4.0))
    for images, epochs in reversed(_AFFORDABLE):
        if seconds * images * (epochs * runs + tuning_epochs * tuning) / 3600 + _MEASURING_H <= hours:
            return images, epochs
    return _AFFORDABLE[0]


def other_sizes(images: int, epochs: int) -> tuple[tuple[int, int], ...]:
    """Return (training images, epochs): as many epochs as the main size, or as many updates if images are fewer."""
    return tuple((size, max(epochs, epochs * images // size)) for size in SIZES if size != images)


def parser() -> argparse.ArgumentParser:
    """Return the options of the command."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, help="folder with train/CLASS and val/CLASS")
    options.add_argument("--out", type=Path, default=Path("runs/fidelity"), help="folder of runs and results")
    options.add_argument("--report", type=Path, help="Markdown file; only writes the results so far")
    options.add_argument("--note", default="", help="paragraph for the introduction of the report")
    options.add_argument("--run", help="RECIPE:SEED; only trains this run of the plan, after its trials")
    options.add_argument("--tune", action="store_true", help="only runs the trials")
    options.add_argument("--budget-hours", type=float, help="hours after which no run starts; chooses the size")
    options.add_argument("--images", type=int, help="training images (default: what the budget allows)")
    options.add_argument("--epochs", type=int, default=40, help="epochs of a vanilla run (default: 40)")
    options.add_argument("--tuning-epochs", type=int, default=12, help="epochs of a trial (default: 12)")
    options.add_argument("--tuning-images", type=int, help="training images of a trial (default: --images)")
    options.add_argument("--seeds", type=int, default=3, help="seeds of the main recipes (default: 3)")
    options.add_argument(
        "--corrupted", type=int, default=5_000, help="test images per corruption and severity (default: 5000)"
    )
    options.add_argument("--arch", default="cifar_resnet20", help="architecture (default: cifar_resnet20)")
    options.add_argument("--amp", default="none", help="none, bf16 or fp16 (default: none)")
    options.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    options.add_argument("--workers", type=int, help="loader processes (default: 0 on a CPU, up to 16 on a GPU)")
    options.add_argument("--main-only", action="store_true", help="no comparison over data size and width")
    return options


def study_config(options: argparse.Namespace) -> StudyConfig:
    """Return the settings of the command line.

    Raises:
        ConfigError: the data or the size is missing.
    """
    if options.data is None:
        raise ConfigError("found no images to train on; add --data DIR with train/CLASS and val/CLASS")
    images, epochs = options.images, options.epochs
    if images is None:
        if not options.budget_hours:
            raise ConfigError("found no size; add --images or --budget-hours")
        images, epochs = affordable(options.budget_hours, options.arch, options.tuning_epochs, options.seeds)
    wide = f"{options.arch}_x2"
    plan = Plan(
        images=images,
        epochs=epochs,
        tuning_epochs=options.tuning_epochs,
        tuning_images=options.tuning_images,
        arch=options.arch,
        amp=options.amp,
        seeds=options.seeds,
        sizes=() if options.main_only else other_sizes(images, epochs),
        wide="" if options.main_only or not timm.is_model(wide) else wide,
    )
    hours = options.budget_hours or float("inf")
    return StudyConfig(
        data=options.data,
        out=options.out,
        plan=plan,
        device=options.device,
        workers=options.workers,
        hours=hours,
        corrupted=options.corrupted,
    )


def run(options: argparse.Namespace) -> None:
    """Do what the options select.

    Raises:
        AdvPropError: see `Study` and `write_report`.
    """
    if options.report is not None:
        write_report(options.out, options.report, options.note)
        print(f"wrote {options.report}")
        return
    study = Study(study_config(options))
    if options.tune:
        study.tune()
        return
    if options.run is None:
        study.run()
        return
    recipe, _, seed = options.run.partition(":")
    known = (*MAIN_RECIPES, *OTHER_RECIPES)
    if recipe not in known or not seed.isdigit():
        raise ConfigError(f"--run {options.run}: expected RECIPE:SEED, with a recipe from {', '.join(known)}")
    print(study.weights_of(recipe, int(seed)))


def main() -> int:
    set_up_logging()
    try:
        run(parser().parse_args())
    except AdvPropError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
