"""`Study`: trains and measures the runs of a plan, and resumes after an interruption.

Several processes may work on one study: each takes runs that no other process has locked.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.fidelity.data import HELD_OUT, prepare
from benchmarks.fidelity.measure import Measurements, weights_hash
from benchmarks.fidelity.plan import LONG, TUNED, Cell, Plan, Settings, trials
from runtime.errors import TrainingDiverged
from runtime.system.files import write_text
from runtime.system.locks import file_lock
from train.loop import fit
from train.recipes import RECIPES
from train.reporting import EpochMetrics, SilentReporter

__all__ = ["FILES", "HELD", "PLAN", "ROUTES", "TRAINED", "Study", "StudyConfig", "read"]

TRAINED, HELD, ROUTES, FILES = "trained.json", "held.json", "routes.json", "files.json"
"""Results in the folder of a run: training, held-out accuracy, test images, exported files."""
PLAN = "study.json"
"""Settings of the study and versions of the libraries, in the output folder."""
_WAIT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Settings of a study."""

    data: Path
    """Folder with train/CLASS and val/CLASS."""
    out: Path
    """Folder of all runs and results."""
    plan: Plan
    """Size of the study."""
    device: str = "cpu"
    """torch device."""
    workers: int | None = None
    """Loader processes of each training run (see `Cell.config`)."""
    hours: float = float("inf")
    """Time after which no new run starts."""
    held_out: int = HELD_OUT
    """Training images that are held out to choose settings."""
    attacked: int = 1_000
    """Test images that are attacked."""
    corrupted: int = 5_000
    """Test images per corruption and severity."""
    per_file: int = 1_000
    """Test images per corruption and severity for ONNX files."""
    corruptions: tuple[str, ...] = ()
    """Corruptions to measure (default: all fifteen)."""


class Study:
    """All runs of a plan. Every result is written as soon as it exists."""

    def __init__(self, config: StudyConfig) -> None:
        self.config, self.plan, self.out = config, config.plan, config.out
        (self.out / "locks").mkdir(parents=True, exist_ok=True)
        self._deadline = time.monotonic() + 3600 * config.hours
        self._measurements = Measurements(
            test=config.data / "val",
            cache=self.out / "corrupted",
            device=config.device,
            attacked=config.attacked,
            corrupted=config.corrupted,
            per_file=config.per_file,
            corruptions=config.corruptions,
        )

    def run(self) -> bool:
        """Train and measure everything, and return whether the time was sufficient."""
        if not self.tune():
            return False
        chosen = self.chosen()
        self._log(f"chosen: {'; '.join(f'{recipe}: {settings}' for recipe, settings in chosen.items())}")
        main = list(self.plan.main_cells(chosen))
        steps = [(self.measure, cell) for cell in main]
        steps += [(self.measure_files, cell) for cell in main if cell.recipe in TUNED]
        steps += [(self.measure, cell) for cell in self.plan.other_cells(chosen)]
        return self._work([(step, cell) for step, cell in steps if cell.recipe in RECIPES or cell.recipe == LONG])

    def weights_of(self, recipe: str, seed: int) -> str:
        """Train one run of the main comparison, and return the hash of its weights."""
        self.tune()
        cell = self.plan.cell(recipe, seed, self.chosen())
        self.train(cell)
        return str(read(self.folder(cell) / TRAINED).get("weights_sha256", "the training diverged"))

    def tune(self) -> bool:
        """Run all trials, and return whether the time was sufficient."""
        write_text(self.out / PLAN, json.dumps(_description(self.config), indent=1))
        return self._work([(self.try_settings, cell) for recipe in TUNED for cell in trials(self.plan, recipe)])

    def _work(self, steps: Sequence[tuple[Callable[[Cell], None], Cell]]) -> bool:
        """Do every step, or wait until another process has done it; return whether the time was sufficient."""
        while steps:
            left = []
            for step, cell in steps:
                if self._is_over():
                    return False
                with file_lock(self.out / "locks" / cell.name, timeout_s=0) as free:
                    if free and self._can_start(cell):
                        step(cell)
                    else:
                        left.append((step, cell))
            if len(left) == len(steps):
                time.sleep(_WAIT_S)
            steps = left
        return True

    def _can_start(self, cell: Cell) -> bool:
        """Return whether the run that `finetune` starts from is finished."""
        return cell.recipe != "finetune" or (self.folder(self._source(cell)) / TRAINED).exists()

    def train(self, cell: Cell) -> Path | None:
        """Train, or find the finished run; return its last checkpoint, or None if it diverged."""
        folder = self.folder(cell)
        trained = read(folder / TRAINED)
        if trained is None:
            trained = self._train(cell, folder)
            write_text(folder / TRAINED, json.dumps(trained, indent=1))
        return None if trained["diverged"] else folder / "last.pt"

    def _train(self, cell: Cell, folder: Path) -> dict[str, Any]:
        start = None
        if cell.recipe == "finetune":
            start = self.train(self._source(cell))
            if start is None:
                return {"diverged": True}
        device, workers = self.config.device, self.config.workers
        config = cell.config(self._images(cell), folder, device=device, workers=workers, start=start)
        clock = _Clock(folder / "cpu_s.json")
        try:
            result = fit(config, clock)
        except TrainingDiverged as error:
            self._log(f"{cell.name}: {error}")
            folder.mkdir(parents=True, exist_ok=True)
            return {"diverged": True}
        return {
            "diverged": False,
            "cpu_s": clock.total_s,
            "weights_sha256": weights_hash(result.last),
            "curve": [{"top1": row.top1, "top1_attacked": row.top1_attacked} for row in result.metrics],
        }

    def _source(self, cell: Cell) -> Cell:
        """Return the run that `finetune` starts from."""
        return self.plan.cell("adversarial", cell.seed, self.chosen(), images=cell.images, epochs=cell.epochs)

    def _images(self, cell: Cell) -> Path:
        return prepare(self.config.data, self.out / "data", cell.images, self.config.held_out)

    def folder(self, cell: Cell) -> Path:
        """Return the folder of a run."""
        return self.out / cell.name

    def try_settings(self, cell: Cell) -> None:
        """Train a trial and measure it on held-out images."""
        folder = self.folder(cell)
        if (folder / HELD).exists():
            return
        checkpoint = self.train(cell)
        top1 = 0.0
        if checkpoint is not None:
            top1 = self._measurements.clean_accuracy(checkpoint, self._images(cell) / "held")
        held = {"top1": top1, "amp": cell.amp, "settings": vars(cell.settings)}
        write_text(folder / HELD, json.dumps(held, indent=1))
        self._log(f"{cell.name}: {cell.settings}: {top1:.4f}")

    def chosen(self) -> dict[str, Settings]:
        """Return the settings of the best trial of each tuned recipe."""
        return {
            recipe: max(
                (cell for cell in trials(self.plan, recipe)),
                key=lambda cell: float((read(self.folder(cell) / HELD) or {"top1": -1.0})["top1"]),
            ).settings
            for recipe in TUNED
        }

    def measure(self, cell: Cell) -> None:
        """Train a run and measure its checkpoint on the test images; auxiliary routes with one seed."""
        folder = self.folder(cell)
        if (folder / ROUTES).exists():
            return
        checkpoint = self.train(cell)
        if checkpoint is None:
            return
        routes = self._measurements.measure_checkpoint(checkpoint, auxiliary=cell.seed == 0)
        write_text(folder / ROUTES, json.dumps(routes, indent=1))
        main = routes["main"]
        self._log(f"{cell.name}: top-1 {main['top1']:.4f}, corruption error {main['corruption_error']:.4f}")

    def measure_files(self, cell: Cell) -> None:
        """Export a run and measure its files on the test images."""
        folder = self.folder(cell)
        checkpoint = None if (folder / FILES).exists() else self.train(cell)
        if checkpoint is None:
            return
        files = self._measurements.measure_files(checkpoint, self._images(cell) / "train")
        write_text(folder / FILES, json.dumps(files, indent=1))
        errors = ", ".join(f"{precision} {file['corruption_error']:.4f}" for precision, file in files.items())
        self._log(f"{cell.name}: corruption error of the files: {errors}")

    def _is_over(self) -> bool:
        if time.monotonic() < self._deadline:
            return False
        self._log("the budget is used up; repeat the command to continue")
        return True

    def _log(self, text: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M')} {text}"
        print(line, flush=True)
        with (self.out / "progress.log").open("a") as file:
            file.write(line + "\n")


class _Clock(SilentReporter):
    """Adds up the CPU time of a run, also over interruptions; it loses the unfinished epoch."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._began = time.process_time()
        self.total_s: float = read(path) or 0.0

    def epoch_ended(self, metrics: EpochMetrics, epochs: int, seconds_left: float) -> None:
        now = time.process_time()
        self.total_s, self._began = self.total_s + now - self._began, now
        write_text(self._path, json.dumps(self.total_s))


def read(path: Path) -> Any:
    """Return the content of a JSON file, or None if it does not exist."""
    return json.loads(path.read_text()) if path.exists() else None


def _description(config: StudyConfig) -> dict[str, Any]:
    threads = torch.get_num_threads()
    gpu = f"{torch.cuda.get_device_name(config.device)}, " if torch.device(config.device).type == "cuda" else ""
    return {
        "plan": dataclasses.asdict(config.plan),
        "device": config.device,
        "corrupted": config.corrupted,
        "versions": {name: metadata.version(name) for name in ("torch", "timm", "numpy", "onnx")},
        "machine": f"{gpu}{platform.machine()}, {os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''}",
    }
