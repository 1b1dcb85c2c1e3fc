"""Trackers. Weights & Biases runs for real, in its offline mode, in another process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from train.config import TrainConfig
from train.tracking import TensorBoardTracker, open_trackers

TRAIN = """
import json, sys
from pathlib import Path
import torch, wandb
from train.config import DataConfig, TrainConfig
from train.loop import fit
from train.reporting import SilentReporter

class PrintRun(SilentReporter):
    def epoch_ended(self, metrics, epochs, seconds_left):
        run = wandb.run
        facts = {"id": run.id, "project": run.project, "arch": run.config["arch"], "top1": metrics.top1}
        print(json.dumps({**facts, **dict(run.summary)}))

torch.set_num_threads(1)
data = DataConfig(img_size=16, workers=0)
settings = {"arch": "resnet10t", "recipe": "vanilla", "batch_size": 256, "epochs": 2, "data": data, "log_every": 2}
fit(TrainConfig(**settings, out=Path(sys.argv[1]), wandb="digits", tensorboard=False, resume="auto"), PrintRun())
"""
OPEN = """
import sys
from pathlib import Path
from runtime.errors import ConfigError
from train.config import TrainConfig
from train.tracking import open_trackers

if "missing" in sys.argv:
    sys.modules["wandb"] = None
try:
    open_trackers(TrainConfig(arch="resnet10t", wandb="digits", tensorboard=False), Path(sys.argv[1]), 0)
except ConfigError as error:
    print(error)
"""


def python(program: str, *arguments: object, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    run = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def train(out: Path) -> list[dict[str, Any]]:
    """Train the remaining epochs with Weights & Biases; return its run after each of them."""
    output = python(TRAIN, out, WANDB_MODE="offline", WANDB_SILENT="true")
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def test_the_settings_choose_the_trackers(tmp_path: Path) -> None:
    assert open_trackers(TrainConfig(arch="a", tensorboard=False), tmp_path, 0) == []
    (tracker,) = open_trackers(TrainConfig(arch="a"), tmp_path, 0)
    assert isinstance(tracker, TensorBoardTracker)
    tracker.close()
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.slow
def test_wandb_records_a_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra [wandb] is not installed")
    first, second = train(tmp_path / "run")
    # wandb completes a step when a later one is logged, so the steps 5 and 10 are missing.
    assert (first["_step"], second["_step"]) == (4, 8)
    for run in (first, second):
        assert (run["project"], run["arch"], run["id"]) == ("digits", "resnet10t", first["id"])
        assert 0 < run["loss/clean"] == run["loss"] < 10
    assert second["epoch/top1"] == first["top1"]
    (file,) = (tmp_path / "run").glob(f"wandb/offline-run-*/run-{first['id']}.wandb")
    assert file.read_bytes().count(b"epoch/top1_attacked") >= 2


def test_wandb_without_a_login_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra [wandb] is not installed")
    message = python(OPEN, tmp_path, WANDB_MODE="online", HOME=str(tmp_path))
    assert "Weights & Biases does not start: " in message
    assert "run `wandb login`, or set WANDB_MODE=offline" in message


def test_a_missing_wandb_is_reported(tmp_path: Path) -> None:
    message = python(OPEN, tmp_path, "missing")
    assert message.strip() == "the setting wandb needs the package wandb: pip install wandb"
