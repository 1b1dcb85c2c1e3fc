"""Kill training, export, calibration and evaluation at random times, and run them again.

    python -m benchmarks.kill_and_resume                                   ten training runs
    python -m benchmarks.kill_and_resume --runs 20 --recipes advprop \\
        --stages train export calibrate evaluate                           20 of each stage

One run of each stage is not interrupted. The others are killed with SIGKILL at a random time and
started again with the same command. Training resumes with `--resume auto` and is compared bit by
bit: weights, moving average, optimizer, schedule, random generators, counters and metrics. Of an
export and a calibration, the ONNX files are compared, also directly after the kill: a file with its
final name must be complete. Of an evaluation, the counts are compared. The script exits with 1 if
any run differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.system.decode import decode
from train.checkpoint import load_checkpoint
from train.data import ImageSet, embedded_digits

COMPARED = ("state_dict", "ema_state_dict", "optimizer", "scheduler", "rng", "epoch", "batch", "step")
SETTINGS = [
    *("--arch", "resnet10t", "--epochs", "3", "--batch-size", "64", "--img-size", "16"),
    *("--set", "save_every=2", "--set", "optim.ema_decay=0.99", "--set", "data.auto_augment=rand-m5-mstd0.5"),
]


def command(out: Path, recipe: str, workers: int) -> list[str]:
    run = [sys.executable, "-m", "train.run", *SETTINGS, "--recipe", recipe, "--workers", str(workers)]
    return [*run, "--out", str(out), "--resume", "auto"]


def run_whole(arguments: list[str], environment: dict[str, str] | None = None) -> None:
    subprocess.run(
        arguments,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | (environment or {}),
    )


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


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage after training."""

    command: Callable[[Path], list[str]]
    """Output folder → command."""
    result: Callable[[Path], dict[str, str]]
    """Output folder → hash of each result."""
    atomic: bool
    """Whether a result that exists after a kill must be that of the whole run."""


def onnx_hashes(out: Path) -> dict[str, str]:
    """Return the hashes of the ONNX files with their final names; temporary ones are hidden."""
    names = [path.relative_to(out) for path in sorted(out.rglob("*.onnx*"))]
    return {
        str(name): hashlib.sha256((out / name).read_bytes()).hexdigest()
        for name in names
        if not any(part.startswith(".") for part in name.parts)
    }


def cell_hashes(out: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(json.dumps(json.loads(path.read_text())["cells"]).encode()).hexdigest()
        for path in sorted(out.glob("*.json"))
    }


def write_digits(folder: Path) -> None:
    """Write the held-out digits as a folder of classes."""
    val = embedded_digits().val
    assert isinstance(val, ImageSet)
    for number, label in enumerate(val.labels):
        path = folder / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        decode(val.images[number]).save(path)


def later_stages(folder: Path, checkpoint: Path) -> dict[str, Stage]:
    """Return the stages after training; export once for the stages that need an ONNX file."""
    digits, exported = folder / "digits", folder / "exported"
    write_digits(digits)
    export = [sys.executable, "-m", "export.cli", str(checkpoint), "--precision", "fp16", "--out"]
    run_whole([*export, str(exported)])
    tool, model = [sys.executable, "-m", "advprop"], str(exported / "model.onnx")
    calibrate = [*tool, "calibrate", model, "--data", str(digits), "--out"]
    suite = ["--suite", "corruptions", "--data", str(digits), "--workers", "0"]
    cells = [part for name in ("clean", "fog", "contrast", "pixelate") for part in ("--only", name)]
    return {
        "export": Stage(command=lambda out: [*export, str(out)], result=onnx_hashes, atomic=True),
        "calibrate": Stage(command=lambda out: [*calibrate, str(out / "m.onnx")], result=onnx_hashes, atomic=True),
        "evaluate": Stage(
            command=lambda out: [*tool, "eval", model, *suite, *cells, "--out", str(out)],
            result=cell_hashes,
            atomic=False,
        ),
    }


def kill_stage(name: str, stage: Stage, folder: Path, runs: int, chance: random.Random) -> int:
    """Kill the runs of one stage and run them again; return how many differ."""
    failures = 0
    whole = folder / f"{name}-whole"
    whole.mkdir()
    began = time.monotonic()
    run_whole(stage.command(whole), {"ADVPROP_CACHE": str(whole / ".cache")})
    seconds, expected = time.monotonic() - began, stage.result(whole)
    assert expected, f"{name} wrote no results"
    print(f"{name}: {', '.join(expected)} in {seconds:.0f} s, not interrupted")
    for number in range(1, runs + 1):
        out, delay_s = folder / f"{name}-{number}", chance.uniform(0.1, 1) * seconds
        out.mkdir()
        environment = {"ADVPROP_CACHE": str(out / ".cache")}
        with subprocess.Popen(
            stage.command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | environment
        ) as run:
            time.sleep(delay_s)
            run.kill()
        left = stage.result(out) if stage.atomic else {}
        broken = [file for file, digest in left.items() if expected.get(file) != digest]
        run_whole(stage.command(out), environment)
        found = stage.result(out)
        different = [file for file in expected if found.get(file) != expected[file]]
        failures += bool(broken or different)
        verdict = f"DIFFERENT: {', '.join({*broken, *different})}" if broken or different else "equal"
        print(f"{number:2}  {name}, killed after {delay_s:.1f} s, {len(left)} files complete: {verdict}", flush=True)
    return failures


def kill_training(arguments: argparse.Namespace, folder: Path, chance: random.Random) -> int:
    """Kill training runs and resume them; return how many differ."""
    failures = 0
    seconds = {}
    for recipe in arguments.recipes:
        began = time.monotonic()
        run_whole(command(folder / recipe, recipe, 0))
        seconds[recipe] = time.monotonic() - began
        steps = load_checkpoint(folder / recipe / "last.pt")["step"]
        print(f"{recipe}: {steps} steps in {seconds[recipe]:.0f} s, not interrupted")
    for number in range(arguments.runs if "train" in arguments.stages else 0):
        recipe = arguments.recipes[number % len(arguments.recipes)]
        workers = arguments.workers[number // len(arguments.recipes) % len(arguments.workers)]
        out = folder / f"killed-{number}"
        run = command(out, recipe, workers)
        at = run_killed(run, out / "last.pt", chance.uniform(0, 0.6 * seconds[recipe]))
        run_whole(run)
        found = differences(folder / recipe / "last.pt", out / "last.pt")
        failures += bool(found)
        verdict = f"DIFFERENT: {', '.join(found)}" if found else "equal"
        print(f"{number + 1:2}  {recipe}, {workers} workers, killed after step {at:2} was saved: {verdict}", flush=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = ["train", "export", "calibrate", "evaluate"]
    parser.add_argument("--stages", nargs="+", default=["train"], choices=stages, help="stages to kill")
    parser.add_argument("--runs", type=int, default=10, help="runs to kill in each stage")
    parser.add_argument("--recipes", nargs="+", default=["advprop", "fast"], help="recipes, used alternately")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="loader processes, used alternately")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        failures = kill_training(arguments, folder, chance)
        later = [stage for stage in stages[1:] if stage in arguments.stages]
        if later:
            known = later_stages(folder, folder / arguments.recipes[0] / "last.pt")
            failures += sum(kill_stage(each, known[each], folder, arguments.runs, chance) for each in later)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
