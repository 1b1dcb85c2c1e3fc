"""Measure accuracy and robustness of every recipe, by BatchNorm route.

    python -m benchmarks.recipes --data cifar10    one epoch each: about 40 minutes on two cores
    python -m benchmarks.recipes --data cifar10 --epochs 100 --seeds 0 1 2 --amp bf16    on a GPU: full length

Each recipe trains the architecture for the same number of epochs with the same attack. Accuracy is
then measured through the main route and through every auxiliary one, on clean images and under
white-box PGD-10 (untargeted, random start, step 2.5 ε / 10) at ε = 4/255 and 8/255. `finetune`
starts from the `adversarial` run of the same seed, so it trains for twice as many epochs.

The script prints a Markdown table, and whether it agrees with the claims of the AdvProp slides.
Finished runs are not repeated: after an interruption, run the same command again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from runtime.errors import AdvPropError
from runtime.spec import ModelSpec
from runtime.system.console import set_up_logging
from train.attack import accuracy, evaluation_attack
from train.checkpoint import load_checkpoint
from train.config import AttackConfig, DataConfig, OptimConfig, TrainConfig
from train.data import ImageData
from train.dual_bn import find_router
from train.folders import image_folder
from train.loaders import eval_loader
from train.loop import fit
from train.models import resolve_device, restore_model
from train.recipes import MAIN, RECIPES
from train.reporting import RichReporter

ORDER = ("vanilla", "adversarial", "finetune", "shared-bn", "advprop", "fine-grained", "fast")
PGD_STEPS = 10
STRENGTHS = (4.0, 8.0)
COLUMNS = ("clean", *(f"PGD-{PGD_STEPS} at {strength:g}/255" for strength in STRENGTHS))
Result = dict[str, Any]


def config_of(recipe: str, seed: int, arguments: argparse.Namespace) -> TrainConfig:
    return TrainConfig(
        arch=arguments.arch,
        recipe=recipe,
        epochs=arguments.epochs,
        seed=seed,
        amp=arguments.amp,
        device=arguments.device,
        out=folder_of(recipe, seed, arguments),
        resume="auto",
        init_checkpoint=folder_of("adversarial", seed, arguments) / "last.pt" if recipe == "finetune" else None,
        attack=AttackConfig(epsilon=arguments.epsilon, steps=arguments.attack_steps, step_size=arguments.step_size),
        data=DataConfig(root=arguments.data, workers=arguments.workers),
        optim=OptimConfig(lr=arguments.lr),
        eval_attack_images=128,
    )


def folder_of(recipe: str, seed: int, arguments: argparse.Namespace) -> Path:
    return Path(arguments.out) / f"{recipe}-{seed}"


def run(recipe: str, seed: int, data: ImageData, arguments: argparse.Namespace, console: Console) -> Result:
    """Train and measure one recipe, or return the stored result of an earlier call."""
    done = folder_of(recipe, seed, arguments) / "result.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    began = time.monotonic()
    fitted = fit(config_of(recipe, seed, arguments), RichReporter(console))
    trained = time.monotonic()
    routes = measure(fitted.last, data, arguments)
    result = {
        "recipe": recipe,
        "seed": seed,
        "routes": routes,
        "train_s": sum(row.seconds for row in fitted.metrics),
        "evaluate_s": time.monotonic() - trained,
        "all_s": time.monotonic() - began,
    }
    done.write_text(json.dumps(result, indent=1))
    return result


def measure(checkpoint: Path, data: ImageData, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Return the accuracies of COLUMNS, by route."""
    content = load_checkpoint(checkpoint)
    spec = ModelSpec.from_json(content["spec"], where=str(checkpoint)).preprocessing
    device = resolve_device(arguments.device)
    model = restore_model(content, checkpoint, routes=True).to(device).to(memory_format=torch.channels_last)
    common: dict[str, Any] = {"batch_size": 128, "device": device}
    settings = DataConfig(root=arguments.data, workers=arguments.workers)
    every = max(1, len(data.val) // arguments.attacked_images)
    router = find_router(model)
    figures = {}
    for route in (MAIN, *(router.auxiliary if router else ())):
        clean = accuracy(model, eval_loader(data, settings, spec, **common), bn=route)
        attacked = [
            accuracy(
                model,
                eval_loader(data, settings, spec, every=every, **common),
                evaluation_attack(strength, spec.mean, spec.std, PGD_STEPS),
                bn=route,
            )
            for strength in STRENGTHS
        ]
        figures[route] = [clean, *attacked]
    return figures


def table(results: list[Result]) -> str:
    lines = [
        f"| recipe | route | {' | '.join(COLUMNS)} | training, s | ÷ vanilla |",
        "|---|---|" + "---|" * (len(COLUMNS) + 2),
    ]
    base = mean_of([result["train_s"] for result in results if result["recipe"] == "vanilla"])
    for recipe in ORDER:
        mine = [result for result in results if result["recipe"] == recipe]
        for route in mine[0]["routes"] if mine else ():
            cells = [spread([100 * result["routes"][route][column] for result in mine]) for column in range(3)]
            seconds = mean_of([result["train_s"] for result in mine])
            cost = f"{seconds:.0f} | {seconds / base:.2f}" if route == MAIN else " | "
            lines.append(f"| {recipe} | {route} | {' | '.join(cells)} | {cost} |")
    return "\n".join(lines)


def expectations(results: list[Result]) -> list[str]:
    """Return the claims of the slides, with the measured numbers."""

    def figure(recipe: str, route: str, column: int) -> float:
        return 100 * mean_of([r["routes"][route][column] for r in results if r["recipe"] == recipe])

    def line(claim: str, low: float, high: float) -> str:
        return f"- {claim}: {low:.1f}% and {high:.1f}%: {'confirmed' if low < high else 'NOT confirmed'}"

    lines = [
        line(
            "adversarial training alone reduces clean accuracy",
            figure("adversarial", MAIN, 0),
            figure("vanilla", MAIN, 0),
        ),
        line(
            "shared BNs have a lower clean accuracy than AdvProp",
            figure("shared-bn", MAIN, 0),
            figure("advprop", MAIN, 0),
        ),
    ]
    for column, strength in enumerate(STRENGTHS, 1):
        claim = f"AdvProp's main route is less robust than its auxiliary one at {strength:g}/255"
        lines.append(line(claim, figure("advprop", MAIN, column), figure("advprop", "adv", column)))
    return lines


def mean_of(values: list[float]) -> float:
    return statistics.fmean(values) if values else float("nan")


def spread(values: list[float]) -> str:
    return f"{mean_of(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/IMAGE and val/CLASS/IMAGE")
    parser.add_argument("--arch", default="resnet18", help="architecture, by its timm name")
    parser.add_argument("--recipes", nargs="+", default=list(ORDER), choices=ORDER, help="recipes to compare")
    parser.add_argument("--epochs", type=int, default=1, help="epochs per recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of each recipe per seed")
    parser.add_argument("--epsilon", type=float, default=4.0, help="strength of the training attack, in 1/255")
    parser.add_argument("--attack-steps", type=int, default=2, help="steps of the training attack")
    parser.add_argument("--step-size", type=float, default=3.0, help="step size of the training attack, in 1/255")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--amp", default="none", choices=["none", "bf16", "fp16"], help="mixed precision")
    parser.add_argument("--device", default="auto", help="torch device; auto uses a GPU if available")
    parser.add_argument("--workers", type=int, help="loader processes")
    parser.add_argument("--attacked-images", type=int, default=1000, help="attacked validation images")
    parser.add_argument("--out", default="runs/recipes", help="folder of all runs")
    arguments = parser.parse_args()
    console = set_up_logging()
    if "finetune" in arguments.recipes and "adversarial" not in arguments.recipes:
        parser.error("finetune starts from adversarial; add adversarial to --recipes")
    try:
        data = image_folder(arguments.data)
        order = [name for name in ORDER if name in arguments.recipes]
        results = [run(name, seed, data, arguments, console) for seed in arguments.seeds for name in order]
    except AdvPropError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    seconds = sum(result["all_s"] for result in results)
    print(
        f"{arguments.arch}, {arguments.epochs} epoch(s), attack ε = {arguments.epsilon:g}/255 in "
        f"{arguments.attack_steps} steps of {arguments.step_size:g}/255, {len(arguments.seeds)} seed(s), "
        f"{seconds / 60:.0f} minutes\n"
    )
    print(table(results))
    if set(order) == set(RECIPES):
        print("\n" + "\n".join(expectations(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
