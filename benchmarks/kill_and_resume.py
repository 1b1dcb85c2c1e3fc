"""Kill training runs at random times and finish them with `--resume auto`.

    python -m benchmarks.kill_and_resume    ten runs, about five minutes on two cores

One run is not interrupted. The others are killed with SIGKILL at a random time after their first
checkpoint, resumed, and compared bit by bit with the first run: weights, moving average, optimizer,
schedule, random generators, counters and metrics. The script prints the last saved step of each
killed run and exits with 1 if any run differs.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from train.checkpoint import load_checkpoint

COMPARED = ("state_dict", "ema_state_dict", "optimizer", "scheduler", "rng", "epoch", "batch", "step")
SETTINGS = [
    *("--arch", "resnet10t", "--epochs", "3", "--batch-size", "64", "--img-size", "16"),
    *("--set", "save_every=2", "--set", "optim.ema_decay=0.99", "--set", "data.auto_augment=rand-m5-mstd0.5"),
]


def command(out: Path, recipe: str, workers: int) -> list[str]:
    run = [sys.executable, "-m", "train.run", *SETTINGS, "--recipe", recipe, "--workers", str(workers)]
    return [*run, "--out", str(out), "--resume", "auto"]


def run_whole(arguments: list[str]) -> None:
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run_killed(arguments: list[str], last: Path, delay_s: float) -> int:
    """Kill a run `delay_s` seconds after its first checkpoint; return the last step it saved."""
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while not last.exists() and run.poll() is None:
            time.sleep(0.01)
        time.sleep(delay_s)
        run.kill()
    return int(load_checkpoint(last)["step"])


def same(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def differences(first: Path, second: Path) -> list[str]:
    whole, resumed = load_checkpoint(first), load_checkpoint(second)
    found = [key for key in COMPARED if not same(whole[key], resumed[key])]
    metrics = ([(row["loss"], row["top1"], row["top1_attacked"]) for row in run["metrics"]] for run in (whole, resumed))
    return found if same(*metrics) else [*found, "metrics"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="runs to kill")
    parser.add_argument("--recipes", nargs="+", default=["advprop", "fast"], help="recipes, used alternately")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="loader processes, used alternately")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = {}
        for recipe in arguments.recipes:
            began = time.monotonic()
            run_whole(command(folder / recipe, recipe, 0))
            seconds[recipe] = time.monotonic() - began
            steps = load_checkpoint(folder / recipe / "last.pt")["step"]
            print(f"{recipe}: {steps} steps in {seconds[recipe]:.0f} s, not interrupted")
        for number in range(arguments.runs):
            recipe = arguments.recipes[number % len(arguments.recipes)]
            workers = arguments.workers[number // len(arguments.recipes) % len(arguments.workers)]
            out = folder / f"killed-{number}"
            run = command(out, recipe, workers)
            at = run_killed(run, out / "last.pt", chance.uniform(0, 0.6 * seconds[recipe]))
            run_whole(run)
            found = differences(folder / recipe / "last.pt", out / "last.pt")
            failures += bool(found)
            verdict = f"DIFFERENT: {', '.join(found)}" if found else "equal"
            print(
                f"{number + 1:2}  {recipe}, {workers} workers, killed after step {at:2} was saved: {verdict}",
                flush=True,
            )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
