import csv
import dataclasses
import logging
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import nn

from runtime.errors import ConfigError, Interrupted, TrainingDiverged
from tests.support.checkpoints import same
from train.checkpoint import load_checkpoint, save_checkpoint
from train.config import DataConfig, OptimConfig, TrainConfig
from train.config_file import from_mapping, read_toml
from train.loop import FitResult, Trainer, fit
from train.reporting import SilentReporter

CPU = torch.device("cpu")


def small(out: Path, **changes: Any) -> TrainConfig:
    """Return the settings of a run that takes seconds: the digits at 16 px, 11 steps per epoch."""
    settings: dict[str, Any] = {
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


def test_a_run_writes_checkpoints_and_metrics(trained: FitResult) -> None:
    assert trained.last.name == "last.pt"
    assert trained.best.name == "best.pt"
    assert trained.best_epoch == trained.metrics[0]
    with (trained.last.parent / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1"]
    assert float(rows[0]["top1"]) == pytest.approx(trained.metrics[0].top1, rel=1e-5)
    assert float(rows[0]["val_loss"]) > 0
    branches = float(rows[0]["loss_clean"]) + float(rows[0]["loss_adv"])
    assert float(rows[0]["loss"]) == pytest.approx(branches, rel=1e-4)
    assert all(len(value) <= 11 for value in rows[0].values())  # six significant digits
    assert float(rows[0]["images_per_s"]) > 0
    checkpoint = load_checkpoint(trained.last)
    assert (checkpoint["epoch"], checkpoint["batch"], checkpoint["step"]) == (1, 0, 44)
    assert tomllib.loads(checkpoint["config"])["recipe"] == "advprop"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_resumes_within_the_epoch_to_the_same_bits(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
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


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    diverging = OptimConfig(lr=1e30, warmup_epochs=0, clip_grad=0, optimizer="sgd")
    with pytest.raises(
        TrainingDiverged, match=r"not finite at epoch 1, batch \d+; no checkpoint.*Lower the learning.*image \d+"
    ):
        fit(small(tmp_path, optim=diverging))
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="process groups are POSIX")
@pytest.mark.parametrize("workers", ["0", "2"])
def test_ctrl_c_on_the_command_line(tmp_path: Path, workers: str) -> None:
    """A terminal sends the signal to all processes of the run, including the loaders."""
    command = [sys.executable, "-m", "train.run", "--arch", "resnet10t", "--img-size", "16", "--out", str(tmp_path)]
    command += ["--workers", workers]
    with subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        deadline = time.monotonic() + 120
        while not (tmp_path / "last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.5)
        os.killpg(run.pid, signal.SIGINT)
        output, errors = run.communicate(timeout=60)
    assert run.returncode == 130, output + errors
    assert re.search(r"stopped by SIGINT .*Run the same command with --resume to continue", errors.replace("\n", " "))
    assert "Traceback" not in errors
    load_checkpoint(tmp_path / "last.pt")


def test_a_traceback_that_is_kept_does_not_keep_loader_processes(tmp_path: Path) -> None:
    """Python waits for them when it exits, and they ignore signals."""
    program = (
        "import sys\n"
        "from train import DataConfig, TrainConfig, fit\n"
        "from pathlib import Path\n"
        "from train.config import OptimConfig\n"
        "try:\n"
        f"    fit(TrainConfig(arch='resnet10t', epochs=1, out=Path({str(tmp_path)!r}), "
        "data=DataConfig(workers=2, img_size=16), "
        "optim=OptimConfig(lr=1e30, warmup_epochs=0, clip_grad=0, optimizer='sgd')))\n"
        "except Exception as error:\n"
        "    sys.last_value = error\n"
        "    print(type(error).__name__, flush=True)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.stdout == "TrainingDiverged\n", run.stdout + run.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_full_disk_leaves_no_incomplete_file(tmp_path: Path) -> None:
    """A limit on the file size acts like a full disk: writing beyond it fails."""
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


def test_the_checkpoint_of_another_run_is_not_replaced(tmp_path: Path, trained: FitResult) -> None:
    (tmp_path / "last.pt").write_bytes(trained.last.read_bytes())
    with pytest.raises(ConfigError, match=r"last\.pt belongs to another run: continue.*with --resume.*--overwrite"):
        fit(small(tmp_path))
    assert (tmp_path / "last.pt").read_bytes() == trained.last.read_bytes()


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    class Overflow(SilentReporter):
        """Makes a weight infinite after a step, as an update can do although its loss is finite."""

        model: nn.Module

        def stepped(self, loss: float | None) -> None:
            next(self.model.parameters()).data[0] = float("inf")

    reporter = Overflow()
    trainer = Trainer(small(tmp_path, save_every=1), reporter, CPU)
    reporter.model = trainer.state.model
    with pytest.raises(TrainingDiverged, match="weights are not finite after step 1 of epoch 1"):
        trainer.run()
    assert not (tmp_path / "last.pt").exists()


def test_config_toml_repeats_its_run(tmp_path: Path, trained: FitResult) -> None:
    config = from_mapping(read_toml(trained.last.parent / "config.toml"))
    again = fit(dataclasses.replace(config, out=tmp_path))
    first, second = (load_checkpoint(run.last)["state_dict"] for run in (trained, again))
    assert same(first, second)


@pytest.mark.slow
def test_accumulated_batches_make_fewer_updates(tmp_path: Path) -> None:
    fit(small(tmp_path, epochs=1, optim=OptimConfig(accumulate=4), save_every=2, recipe="vanilla"))
    checkpoint = load_checkpoint(tmp_path / "last.pt")
    assert checkpoint["step"] == 3  # 11 batches: 4, 4 and 3


@pytest.mark.parametrize("batches", [2, 4])
def test_accumulated_gradients_are_those_of_the_mean_loss(tmp_path: Path, batches: int) -> None:
    config = small(tmp_path, recipe="vanilla", batch_size=16, optim=OptimConfig(clip_grad=0.0))
    reference, trainer = (
        Trainer(dataclasses.replace(config, out=tmp_path / name), SilentReporter(), CPU) for name in ("a", "b")
    )
    for run in (reference, trainer):
        run.task.eval()  # batch statistics would differ between small and large batches
    images, labels = next(iter(reference.batches))
    parts = list(zip(images.chunk(batches), labels.chunk(batches), strict=True))
    for part, target in parts:
        reference.task(part, target)["loss"].div(batches).backward()
    expected = [parameter.grad for parameter in reference.state.model.parameters()]
    assert all(gradient is not None for gradient in expected)
    gradients: list[torch.Tensor] = []
    trainer.state.optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(cast(torch.Tensor, each.grad).clone() for each in trainer.state.model.parameters())
    )
    for number, (part, target) in enumerate(parts, 1):
        trainer.step(part, target, group=batches, update=number == batches)
    assert same(gradients, expected)


def test_a_run_writes_curves_and_event_files(trained: FitResult) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = trained.last.parent
    with Image.open(folder / "curves.png") as image:
        assert image.size == (1200, 400)
        assert len(image.getcolors(1 << 20) or ()) > 20  # something is drawn
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    (clean,) = events.Scalars("epoch/top1")
    assert (clean.step, clean.value) == (44, pytest.approx(trained.metrics[0].top1))
    for name in ("epoch/val_loss", "epoch/loss/clean", "epoch/loss/adv", "loss/adv"):  # 44 updates: a short run
        (value,) = events.Scalars(name)
        assert value.step == 44


def test_tensorboard_shows_the_loss_of_each_branch(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(small(tmp_path, epochs=1, log_every=5))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("loss", "loss/clean", "loss/adv", "lr"):
        values = events.Scalars(name)
        assert [value.step for value in values] == [5, 10]
        assert all(0 < value.value < 100 for value in values)


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train for two epochs, and return the output folder."""
    out = tmp_path_factory.mktemp("two-epochs")
    fit(small(out))
    return out


def copy_with_best(two_epochs: Path, out: Path, best: int, **changes: object) -> None:
    """Copy `last.pt` of a run, as if epoch `best` were the better one."""
    checkpoint = load_checkpoint(two_epochs / "last.pt")
    config = checkpoint["config"].replace(str(two_epochs), str(out))
    for row in checkpoint["metrics"]:
        row["top1"] = 0.75 if row["epoch"] == best else 0.5
    save_checkpoint(out / "last.pt", {**checkpoint, "config": config, **changes})


def test_a_run_killed_before_it_wrote_best_pt_writes_it_on_resume(tmp_path: Path, two_epochs: Path) -> None:
    copy_with_best(two_epochs, tmp_path, best=2)
    save_checkpoint(tmp_path / "best.pt", {**load_checkpoint(tmp_path / "last.pt"), "epoch": 1})
    result = fit(small(tmp_path, resume="auto"))
    assert load_checkpoint(result.best)["epoch"] == 2
    assert result.best_epoch.epoch == 2
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3


def test_best_pt_of_an_earlier_epoch_is_kept_on_resume(
    tmp_path: Path, two_epochs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy_with_best(two_epochs, tmp_path, best=1)
    save_checkpoint(tmp_path / "best.pt", {**load_checkpoint(tmp_path / "last.pt"), "epoch": 1})
    before = (tmp_path / "best.pt").read_bytes()
    result = fit(small(tmp_path, resume="auto"))
    assert (tmp_path / "best.pt").read_bytes() == before
    assert result.best_epoch.epoch == 1
    assert "best.pt" not in caplog.text


@pytest.mark.parametrize(("content", "problem"), [(None, "no such checkpoint"), (b"PK\x03\x04", "is truncated")])
def test_a_lost_best_pt_is_reported_and_replaced(
    tmp_path: Path, two_epochs: Path, caplog: pytest.LogCaptureFixture, content: bytes | None, problem: str
) -> None:
    """Epoch 1 was better, and only best.pt had its weights."""
    copy_with_best(two_epochs, tmp_path, best=1)
    if content is not None:
        (tmp_path / "best.pt").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        result = fit(small(tmp_path, resume="auto"))
    assert problem in caplog.text
    assert "It held epoch 1, the best so far (clean accuracy 75.0%), whose weights are in no other file" in caplog.text
    assert "best.pt now becomes epoch 2 (50.0%)" in caplog.text
    assert "restore best.pt from a backup" in caplog.text
    assert load_checkpoint(tmp_path / "best.pt")["epoch"] == 2
    assert result.best_epoch.epoch == 2
    caplog.clear()
    assert fit(small(tmp_path, resume="auto")).best_epoch.epoch == 2  # what best.pt holds, not the best row
    assert "whose weights are in no other file" not in caplog.text


def test_a_lost_best_pt_is_reported_within_an_epoch(
    tmp_path: Path, two_epochs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = load_checkpoint(two_epochs / "last.pt")["metrics"][:1]
    copy_with_best(two_epochs, tmp_path, best=1, epoch=1, batch=10, metrics=metrics)
    with caplog.at_level(logging.WARNING):
        result = fit(small(tmp_path, resume="auto"))
    assert "best.pt now becomes the epoch in progress" in caplog.text
    assert result.best_epoch.epoch == load_checkpoint(result.best)["epoch"] == 2


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
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
