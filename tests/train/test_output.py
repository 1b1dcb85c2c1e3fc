"""The output folder of a run: other runs, leftovers, locks; and resuming with other images."""

import logging
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from runtime.errors import ConfigError, Interrupted, OutputError, TrainingDiverged
from runtime.system.locks import reserved_folder
from tests.support import ROOT
from tests.support.training_runs import short_run
from train.checkpoint import load_checkpoint, save_checkpoint
from train.config import OptimConfig
from train.config_file import from_mapping, read_toml
from train.loop import Trainer, fit
from train.reporting import SilentReporter
from train.run import main

CPU = torch.device("cpu")
COMMAND = ["--arch", "test_resnet", "--recipe", "vanilla", "--img-size", "16", "--epochs", "1", "--batch-size", "12"]
COMMAND += ["--workers", "0", "--set", "tensorboard=false", "--set", "eval_attack_images=4"]


settings = partial(short_run, img_size=16)
"""Settings of a run of 4 steps per epoch."""


class StopAt(SilentReporter):
    """Sends this process SIGTERM after a number of steps, or when validation starts."""

    def __init__(self, steps: int = -1, at_evaluation: bool = False) -> None:
        self.steps, self.at_evaluation = steps, at_evaluation

    def stepped(self, loss: float | None) -> None:
        self.steps -= 1
        if self.steps == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    def evaluating(self) -> None:
        if self.at_evaluation:
            os.kill(os.getpid(), signal.SIGTERM)


def test_overwriting_removes_the_old_run_when_the_new_one_starts(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fit(settings(image_folder, out, epochs=1))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError):  # the settings are invalid: the old run is kept whole
        fit(settings(image_folder, out, overwrite=True, optim=OptimConfig(optimizer="adahessian")))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    diverging = OptimConfig(lr=1e30, warmup_epochs=0, clip_grad=0, optimizer="sgd")
    with pytest.raises(TrainingDiverged, match="no checkpoint was written yet"):
        fit(settings(image_folder, out, overwrite=True, arch="test_efficientnet", optim=diverging))
    assert [path.name for path in out.iterdir()] == ["config.toml"]
    assert from_mapping(read_toml(out / "config.toml")).arch == "test_efficientnet"


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_best_pt_without_last_pt_is_not_replaced(image_folder: Path, tmp_path: Path, resume: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.pt").write_bytes(b"weights")
    with pytest.raises(ConfigError, match=r"best\.pt belongs to a run whose last\.pt is missing.*--overwrite"):
        fit(settings(image_folder, tmp_path / "run", resume=resume))
    assert (tmp_path / "run" / "best.pt").read_bytes() == b"weights"


@pytest.mark.parametrize("name", ["best.pt", "last.pt", "metrics.csv"])
def test_a_folder_with_the_name_of_an_output_file(image_folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(OutputError, match=rf"cannot write .*{name}: a folder with that name exists; remove it"):
        fit(settings(image_folder, tmp_path / "run"))


def test_temporary_files_of_a_killed_run_are_removed(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name in (".last.pt.abc.tmp", ".best.pt.12-34.tmp", ".metrics.csv.x.tmp", ".config.toml.y.tmp"):
        (out / name).write_bytes(b"half")
    for name in (".mine.tmp", "last.pt.tmp"):
        (out / name).write_bytes(b"not ours")
    fit(settings(image_folder, out, epochs=1))
    files = {"best.pt", "config.toml", "curves.png", "last.pt", "metrics.csv"}
    assert {path.name for path in out.iterdir()} == {*files, ".mine.tmp", "last.pt.tmp"}


def test_a_second_trainer_in_one_folder_is_refused(image_folder: Path, tmp_path: Path) -> None:
    with reserved_folder(tmp_path):
        run = subprocess.run(
            [sys.executable, "-m", "train.run", *COMMAND, "--data", str(image_folder), "--out", str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert run.returncode == 2, run.stderr
    assert f"{tmp_path} is in use by process {os.getpid()} on " in run.stderr
    assert "choose another folder" in run.stderr
    assert not list(tmp_path.glob("*.pt"))


def test_metrics_of_an_epoch_that_was_stopped_before_its_evaluation(image_folder: Path, tmp_path: Path) -> None:
    fit(settings(image_folder, tmp_path / "whole", epochs=1))
    out = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        fit(settings(image_folder, out, epochs=1), StopAt(at_evaluation=True))
    assert load_checkpoint(out / "last.pt")["batch"] == 4
    (row,) = fit(settings(image_folder, out, epochs=1, resume="auto")).metrics
    (expected,) = load_checkpoint(tmp_path / "whole" / "last.pt")["metrics"]
    assert (row.lr, row.loss, row.top1) == (expected["lr"], expected["loss"], expected["top1"])
    assert row.lr != settings(image_folder, out).resolved_lr
    assert row.images_per_s == pytest.approx(48 / row.seconds)
    assert row.seconds > 0


def test_training_time_adds_up_over_a_stop_within_an_epoch(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        fit(settings(image_folder, tmp_path / "run", epochs=1), StopAt(2))
    stored = load_checkpoint(tmp_path / "run" / "last.pt")
    assert (stored["images"], stored["train_images"]) == (24, 48)
    (row,) = fit(settings(image_folder, tmp_path / "run", epochs=1, resume="auto")).metrics
    assert row.seconds > stored["seconds"] > 0
    assert row.images_per_s == pytest.approx(48 / row.seconds)


def test_resuming_with_fewer_images(image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Interrupted):
        fit(settings(image_folder, tmp_path / "run"), StopAt(3))
    for name in ("bright", "dark"):
        for number in range(12):
            (image_folder / "train" / name / f"{number}.png").unlink()
    with caplog.at_level(logging.WARNING):
        result = fit(settings(image_folder, tmp_path / "run", resume="auto"))
    assert "was written with 48 training images, and there are 24 now" in caplog.text
    assert [row.step for row in result.metrics] == [3, 5]


def test_resuming_after_the_images_were_moved(image_folder: Path, tmp_path: Path) -> None:
    fit(settings(image_folder, tmp_path / "run", epochs=2))
    moved = image_folder.rename(tmp_path / "photos-v2")
    assert len(fit(settings(moved, tmp_path / "run", resume="auto")).metrics) == 2
    (tmp_path / "link").symlink_to(moved)
    assert len(fit(settings(tmp_path / "link", tmp_path / "run", resume="auto")).metrics) == 2


def test_a_checkpoint_of_an_earlier_version_resumes(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        fit(settings(image_folder, tmp_path / "run"), StopAt(2))
    content = load_checkpoint(tmp_path / "run" / "last.pt")
    for key in ("lr", "images", "seconds", "train_images"):
        del content[key]
    save_checkpoint(tmp_path / "run" / "last.pt", content)
    assert len(fit(settings(image_folder, tmp_path / "run", resume="auto")).metrics) == 2


def test_weights_of_other_classes_are_reported(
    image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = fit(settings(image_folder, tmp_path / "run", epochs=1))
    renamed = tmp_path / "renamed"
    shutil.copytree(image_folder, renamed)
    for part in ("train", "val"):
        (renamed / part / "dark").rename(renamed / part / "apple")
    with caplog.at_level(logging.WARNING):
        config = settings(image_folder, tmp_path / "a", recipe="finetune", init_checkpoint=first.best)
        Trainer(config, SilentReporter(), CPU)
        assert "--weights" not in caplog.text
        config = settings(renamed, tmp_path / "b", recipe="finetune", init_checkpoint=first.best)
        Trainer(config, SilentReporter(), CPU)
    assert "has other classes: found bright, expected apple, found dark, expected bright" in caplog.text


@pytest.mark.parametrize("name", ["exp[lr=0.1]", "exp[/1]", "[bold]"])
def test_square_brackets_in_the_output_folder(image_folder: Path, tmp_path: Path, name: str) -> None:
    result = CliRunner().invoke(main, [*COMMAND, "--data", str(image_folder), "--out", str(tmp_path / name)])
    assert result.exit_code == 0, result.output
    assert f"in {tmp_path / name}: last.pt" in result.output
    assert f"next: advprop-export '{tmp_path / name}/best.pt' --trt fp16" in result.output


@pytest.mark.parametrize(("option", "field"), [("--out", "out"), ("--data", "data.root")])
def test_an_empty_path_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, field: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["--arch", "test_resnet", option, ""])
    assert result.exit_code == 2
    assert f"{field} must be a path (not empty, no control characters); found ''" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_config_toml_repeats_a_run_from_another_folder(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = settings(Path(os.path.relpath(image_folder)), Path("run"), epochs=1)
    fit(config)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = CliRunner().invoke(main, ["--config", "../run/config.toml", "--out", "again"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "elsewhere" / "again" / "best.pt").exists()
