import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from runtime.errors import CheckpointError, Interrupted, TrainingDiverged
from train.checkpoint import load_checkpoint
from train.config import DataConfig, OptimConfig, TrainConfig
from train.loop import FitResult, fit
from train.reporting import SilentReporter


def small(out: Path, **changes: object) -> TrainConfig:
    """A run of seconds: the digits at 16 px, 11 steps an epoch."""
    settings = {
        "arch": "resnet10t",
        "epochs": 2,
        "batch_size": 128,
        "out": out,
        "data": DataConfig(img_size=16, workers=0),
        "optim": OptimConfig(ema_decay=0.9),
    }
    return TrainConfig(**{**settings, **changes})


class StopAt(SilentReporter):
    """Sends this process a signal after a number of steps, as a user or a scheduler would."""

    def __init__(self, steps: int, number: signal.Signals) -> None:
        self.steps, self.number = steps, number

    def stepped(self, loss: float | None) -> None:
        self.steps -= 1
        if self.steps == 0:
            os.kill(os.getpid(), self.number)


def same(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return first == second


def test_a_run_leaves_what_it_promises(trained: FitResult) -> None:
    assert trained.last.name == "last.pt"
    assert trained.best.name == "best.pt"
    with (trained.last.parent / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1"]
    assert float(rows[0]["top1"]) == trained.metrics[0].top1
    assert float(rows[0]["images_per_s"]) > 0
    checkpoint = load_checkpoint(trained.last)
    assert (checkpoint["epoch"], checkpoint["batch"], checkpoint["step"]) == (1, 0, 44)
    assert json.loads(checkpoint["config"])["recipe"] == "advprop"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_stopped_mid_epoch_resumes_to_the_same_bits(tmp_path: Path, number: signal.Signals, code: int) -> None:
    fit(small(tmp_path / "whole"))
    with pytest.raises(Interrupted, match=r"stopped by SIG\w+ in epoch 2 after step 15; saved") as stopped:
        fit(small(tmp_path / "broken"), StopAt(15, number))
    assert stopped.value.exit_code == code
    part = load_checkpoint(tmp_path / "broken" / "last.pt")
    assert (part["epoch"], part["batch"], part["step"]) == (1, 4, 15)
    fit(small(tmp_path / "broken", resume=True))
    whole, resumed = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "broken"))
    for key in ("state_dict", "ema_state_dict", "optimizer", "scheduler", "rng", "epoch", "step"):
        assert same(whole[key], resumed[key]), key
    losses = [[(row["loss"], row["top1"], row["top1_attacked"]) for row in run["metrics"]] for run in (whole, resumed)]
    assert losses[0] == losses[1]


def test_resuming_with_other_settings_is_refused(tmp_path: Path, trained: FitResult) -> None:
    (tmp_path / "last.pt").write_bytes(trained.last.read_bytes())
    with pytest.raises(CheckpointError, match="cannot be resumed with another recipe: found advprop, expected vanilla"):
        fit(small(tmp_path, recipe="vanilla", resume=True))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    wild = OptimConfig(lr=1e30, warmup_epochs=0, clip_grad=0, optimizer="sgd")
    with pytest.raises(TrainingDiverged, match=r"not finite at epoch 1, step \d+; no checkpoint.*Lower the learning"):
        fit(small(tmp_path, optim=wild))
    assert not (tmp_path / "last.pt").exists()


def test_ctrl_c_on_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train.run", "--arch", "resnet10t", "--img-size", "16", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        deadline = time.monotonic() + 120
        while not (tmp_path / "last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        output, errors = run.communicate(timeout=60)
    assert run.returncode == 130, output + errors
    assert re.search(r"stopped: .*--resume continues from there", errors)
    assert "Traceback" not in errors
    load_checkpoint(tmp_path / "last.pt")


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_full_disk_leaves_no_half_written_file(tmp_path: Path) -> None:
    """A limit on file size stands in for the disk: writing past it fails in the same place."""
    program = (
        "import resource, sys\n"
        "import torch, train.loop\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        f"sys.argv = ['x', '--arch', 'resnet10t', '--img-size', '16', '--epochs', '1', '--out', {str(tmp_path)!r}]\n"
        "from train.run import main\n"
        "main()\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 2, run.stdout + run.stderr
    assert f"error: cannot write {tmp_path / 'last.pt'}" in run.stderr
    assert "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []
