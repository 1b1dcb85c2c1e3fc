import csv
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image

from runtime.errors import CheckpointError, ConfigError, Interrupted, TrainingDiverged
from train.checkpoint import load_checkpoint
from train.config import DataConfig, OptimConfig, TrainConfig
from train.loop import FitResult, _Run, fit
from train.reporting import SilentReporter

CPU = torch.device("cpu")


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
    assert tomllib.loads(checkpoint["config"])["recipe"] == "advprop"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_stopped_mid_epoch_resumes_to_the_same_bits(tmp_path: Path, number: signal.Signals, code: int) -> None:
    fit(small(tmp_path / "whole"))
    with pytest.raises(Interrupted, match=r"stopped by SIG\w+ in epoch 2 after step 15; saved") as stopped:
        fit(small(tmp_path / "broken"), StopAt(15, number))
    assert stopped.value.exit_code == code
    part = load_checkpoint(tmp_path / "broken" / "last.pt")
    assert (part["epoch"], part["batch"], part["step"]) == (1, 4, 15)
    fit(small(tmp_path / "broken", resume="auto"))
    whole, resumed = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "broken"))
    for key in ("state_dict", "ema_state_dict", "optimizer", "scheduler", "rng", "epoch", "step"):
        assert same(whole[key], resumed[key]), key
    losses = [[(row["loss"], row["top1"], row["top1_attacked"]) for row in run["metrics"]] for run in (whole, resumed)]
    assert losses[0] == losses[1]


def test_resuming_with_other_settings_is_refused(tmp_path: Path, trained: FitResult) -> None:
    (tmp_path / "last.pt").write_bytes(trained.last.read_bytes())
    with pytest.raises(CheckpointError, match=r"recipe: found advprop, expected vanilla.*config\.toml"):
        fit(small(tmp_path, recipe="vanilla", resume="auto"))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    wild = OptimConfig(lr=1e30, warmup_epochs=0, clip_grad=0, optimizer="sgd")
    with pytest.raises(
        TrainingDiverged, match=r"not finite at epoch 1, batch \d+; no checkpoint.*Lower the learning.*image \d+"
    ):
        fit(small(tmp_path, optim=wild))
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="process groups are POSIX")
@pytest.mark.parametrize("workers", ["0", "2"])
def test_ctrl_c_on_the_command_line(tmp_path: Path, workers: str) -> None:
    """As from a terminal: all processes of the run get the signal, the loaders too."""
    command = [sys.executable, "-m", "train.run", "--arch", "resnet10t", "--img-size", "16", "--out", str(tmp_path)]
    command += ["--workers", workers]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as run:
        deadline = time.monotonic() + 120
        while not (tmp_path / "last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.5)
        os.killpg(run.pid, signal.SIGINT)
        output, errors = run.communicate(timeout=60)
    assert run.returncode == 130, output + errors
    assert re.search(r"stopped by SIGINT .*--resume continues from there", errors)
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
    assert {path.name for path in tmp_path.iterdir()} == {"config.toml", "tensorboard"}


def test_another_runs_checkpoint_is_not_lost_by_accident(tmp_path: Path, trained: FitResult) -> None:
    (tmp_path / "last.pt").write_bytes(trained.last.read_bytes())
    with pytest.raises(ConfigError, match=r"last\.pt is of another run: continue it with --resume.*--overwrite"):
        fit(small(tmp_path))
    assert (tmp_path / "last.pt").read_bytes() == trained.last.read_bytes()


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    class Poison(SilentReporter):
        """An update that overflows where the loss before it was finite: the last one of the epoch."""

        def evaluating(self) -> None:
            raise AssertionError("the poisoned weights were saved")

    class Run(_Run):
        def _step(self, images: torch.Tensor, labels: torch.Tensor, group: int, updates: bool) -> torch.Tensor:
            loss = super()._step(images, labels, group, updates)
            next(self.model.parameters()).data[0] = float("inf")
            return loss

    with pytest.raises(TrainingDiverged, match="weights are not finite after step 1 of epoch 1"):
        Run(small(tmp_path, save_every=1), Poison(), torch.device("cpu")).train()
    assert not (tmp_path / "last.pt").exists()


def test_config_toml_of_a_run_repeats_it(tmp_path: Path, trained: FitResult) -> None:
    from train.config_file import from_mapping, read_toml

    config = from_mapping(read_toml(trained.last.parent / "config.toml"))
    again = fit(dataclasses.replace(config, out=tmp_path))
    first, second = (load_checkpoint(run.last)["state_dict"] for run in (trained, again))
    assert same(first, second)


@pytest.mark.slow
def test_accumulating_batches_makes_fewer_updates(tmp_path: Path) -> None:
    fit(small(tmp_path, epochs=1, optim=OptimConfig(accumulate=4), save_every=2, recipe="vanilla"))
    checkpoint = load_checkpoint(tmp_path / "last.pt")
    assert checkpoint["step"] == 3  # 11 batches: 4, 4 and 3


@pytest.mark.parametrize("batches", [2, 4])
def test_accumulated_gradients_are_those_of_the_mean_loss(tmp_path: Path, batches: int) -> None:
    """Two or four small batches update the weights as their mean loss does."""
    config = small(tmp_path, recipe="vanilla", batch_size=16, amp="none")
    runs = [_Run(dataclasses.replace(config, out=tmp_path / str(n)), SilentReporter(), CPU) for n in range(2)]
    for run in runs:
        run.task.eval()  # batch statistics would differ between the small batches and the large one
    images, labels = next(iter(runs[0].batches))
    for part, target in zip(images.chunk(batches), labels.chunk(batches), strict=True):
        runs[0].task(part, target)["loss"].div(batches).backward()
    expected = [parameter.grad.clone() for parameter in runs[0].model.parameters()]
    gradients: list[torch.Tensor] = []
    runs[1].optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(parameter.grad.clone() for parameter in runs[1].model.parameters())
    )
    runs[1].config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, clip_grad=0.0))
    for number, (part, target) in enumerate(zip(images.chunk(batches), labels.chunk(batches), strict=True), 1):
        runs[1]._step(part, target, batches, number == batches)
    assert same(gradients, expected)


def test_a_run_leaves_curves_and_event_files(trained: FitResult) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = trained.last.parent
    with Image.open(folder / "curves.png") as image:
        assert image.size == (1200, 400)
        assert len(image.getcolors(1 << 20)) > 20  # something is drawn
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    (clean,) = events.Scalars("epoch/top1")
    assert (clean.step, clean.value) == (44, pytest.approx(trained.metrics[0].top1))


def test_tensorboard_keeps_each_branchs_loss(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(small(tmp_path, epochs=1, log_every=5))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("loss", "loss/clean", "loss/adv", "lr"):
        values = events.Scalars(name)
        assert [value.step for value in values] == [5, 10]
        assert all(0 < value.value < 100 for value in values)


def test_best_is_written_again_where_a_kill_came_before_it(tmp_path: Path) -> None:
    fit(small(tmp_path, epochs=2))
    before = load_checkpoint(tmp_path / "best.pt")["epoch"]
    shutil.copy(tmp_path / "best.pt", tmp_path / "kept.pt")
    (tmp_path / "best.pt").unlink()
    (tmp_path / "metrics.csv").unlink()
    fit(small(tmp_path, epochs=2, resume="auto"))
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3
    assert (tmp_path / "best.pt").exists() == (before == 2)


@pytest.mark.slow
def test_killed_at_a_random_step_and_resumed_to_the_same_bits(tmp_path: Path) -> None:
    settings = ["--arch", "resnet10t", "--epochs", "2", "--batch-size", "128", "--set", "save_every=3"]
    command = [sys.executable, "-m", "train.run", *settings, "--img-size", "16", "--workers", "0"]
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    broken = [*command, "--out", str(tmp_path / "broken"), "--resume", "auto"]
    with subprocess.Popen(broken, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        deadline = time.monotonic() + 120
        while not (tmp_path / "broken" / "last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.4)
        run.kill()
    subprocess.run(broken, check=True, capture_output=True)
    whole, resumed = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "broken"))
    for key in ("state_dict", "optimizer", "scheduler", "rng", "step"):
        assert same(whole[key], resumed[key]), key
