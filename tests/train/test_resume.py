"""Continue a run with other settings, in another folder, and from the command line."""

import logging
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from runtime.errors import CheckpointError
from tests.support.training_runs import short_run
from train.checkpoint import load_checkpoint
from train.config import OptimConfig
from train.loop import FitResult, fit
from train.run import main


@pytest.fixture
def run(image_folder: Path, tmp_path: Path) -> FitResult:
    return fit(short_run(image_folder, tmp_path / "run"))


def learning_rates(result: FitResult) -> list[float]:
    return [row.lr for row in result.metrics]


def test_more_epochs_extend_the_schedule(
    image_folder: Path, tmp_path: Path, run: FitResult, caplog: pytest.LogCaptureFixture
) -> None:
    whole = fit(short_run(image_folder, tmp_path / "whole", epochs=4))
    with caplog.at_level(logging.INFO):
        longer = fit(short_run(image_folder, tmp_path / "run", epochs=4, resume="auto"))
    assert len(longer.metrics) == 4
    assert learning_rates(longer)[2:] == pytest.approx(learning_rates(whole)[2:])
    assert "changed from epoch 3 on: epochs: 2 → 4" in caplog.text
    (change,) = load_checkpoint(longer.last)["changes"]
    assert change == {"epoch": 2, "step": 8, "setting": "epochs", "before": 2, "after": 4}
    config = (tmp_path / "run" / "config.toml").read_text()
    assert config.startswith("# changed after epoch 2, step 8: epochs: 2 → 4\n")
    assert "epochs = 4" in config


def test_another_learning_rate_starts_a_new_schedule(image_folder: Path, tmp_path: Path, run: FitResult) -> None:
    optim = OptimConfig(lr=1e-4, warmup_epochs=0.0)
    result = fit(short_run(image_folder, tmp_path / "run", epochs=4, resume="auto", optim=optim))
    alone = fit(short_run(image_folder, tmp_path / "alone", optim=optim))
    assert learning_rates(result)[2:] == pytest.approx(learning_rates(alone))
    again = fit(short_run(image_folder, tmp_path / "run", epochs=4, resume="auto", optim=optim))  # nothing is left
    assert again.metrics == result.metrics


def test_other_settings_apply_from_here_on(image_folder: Path, tmp_path: Path, run: FitResult) -> None:
    changes = short_run(
        image_folder,
        tmp_path / "run",
        epochs=3,
        resume="auto",
        batch_size=24,
        optim=OptimConfig(weight_decay=0.5, ema_decay=0.9, label_smoothing=0.0),
    )
    result = fit(changes)
    content = load_checkpoint(result.last)
    assert [row.step for row in result.metrics] == [4, 8, 10]
    assert {group["weight_decay"] for group in content["optimizer"]["param_groups"]} == {0.0, 0.5}
    assert content["ema_state_dict"] is not None
    assert {change["setting"] for change in content["changes"]} == {
        *("epochs", "batch_size", "optim.weight_decay", "optim.ema_decay", "optim.label_smoothing")
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"recipe": "adversarial"}, r"recipe: vanilla → adversarial.*--set recipe=adversarial"),
        ({"optim": OptimConfig(optimizer="sgd")}, r"optim\.optimizer: adamw → sgd.*--set optim\.optimizer=sgd"),
        ({"arch": "test_efficientnet"}, r"arch: test_resnet → test_efficientnet.*choose another --out"),
        ({"epochs": 1}, r"for 1 epochs: it has trained 2 epochs; use --epochs 2 or more"),
    ],
)
def test_what_cannot_change_is_refused(
    image_folder: Path, tmp_path: Path, run: FitResult, changes: dict[str, Any], expected: str
) -> None:
    before = run.last.read_bytes()
    with pytest.raises(CheckpointError, match=expected):
        fit(short_run(image_folder, tmp_path / "run", resume="auto", **changes))
    assert run.last.read_bytes() == before


def test_a_run_continues_in_another_folder(image_folder: Path, tmp_path: Path, run: FitResult) -> None:
    before = {path.name: path.read_bytes() for path in run.last.parent.iterdir()}
    result = fit(short_run(image_folder, tmp_path / "new", epochs=3, resume=str(tmp_path / "run")))
    assert {path.name: path.read_bytes() for path in run.last.parent.iterdir()} == before
    assert result.last == tmp_path / "new" / "last.pt"
    assert result.best.exists()
    assert result.metrics[:2] == run.metrics
    assert len(result.metrics) == 3


def test_best_pt_is_small_and_is_not_resumed(image_folder: Path, tmp_path: Path, run: FitResult) -> None:
    best, last = load_checkpoint(run.best), load_checkpoint(run.last)
    assert set(last) - set(best) == {"optimizer", "scheduler", "scaler", "rng", "loss_sum", "branch_loss_sums"}
    assert run.best.stat().st_size < 0.6 * run.last.stat().st_size
    with pytest.raises(CheckpointError, match=r"without the state of the optimizer; resume .*last\.pt, or .*--weights"):
        fit(short_run(image_folder, tmp_path / "new", resume=str(run.best)))
    assert not (tmp_path / "new").exists()


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_keeps_the_settings_of_the_run(
    image_folder: Path, tmp_path: Path, run: FitResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    invoke("--resume", "run", "--epochs", 3)
    assert len(load_checkpoint(run.last)["metrics"]) == 3
    invoke("--resume", "run/last.pt", "--out", "copy", "--epochs", 4)
    content = load_checkpoint(tmp_path / "copy" / "last.pt")
    assert (content["epoch"], content["recipe"]) == (4, "vanilla")
    assert load_checkpoint(run.last)["epoch"] == 3


def test_a_run_in_the_default_folder_continues_in_a_new_one(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    default = Path("runs") / "test_resnet-vanilla"
    fit(short_run(image_folder, default, epochs=1))
    invoke("--arch", "test_resnet", "--recipe", "vanilla", "--resume", "--out", "new", "--epochs", 2)
    assert load_checkpoint(tmp_path / "new" / "last.pt")["epoch"] == 2
    assert load_checkpoint(default / "last.pt")["epoch"] == 1


def test_weights_from_the_command_line(trained: FitResult, tmp_path: Path) -> None:
    """The architecture is that of the checkpoint, and the classifier is that of its digits."""
    out = tmp_path / "run"
    common = ["--epochs", 1, "--img-size", 16, "--workers", 0, "--recipe", "vanilla", "--batch-size", 256]
    invoke("--weights", trained.best, "--out", out, "--freeze-backbone", 1, "--layer-decay", 0.5, *common)
    content = load_checkpoint(out / "last.pt")
    assert content["arch"] == "resnet10t"
    before = load_checkpoint(trained.best)["ema_state_dict"]
    assert content["state_dict"]["layer1.0.conv1.weight"].equal(before["layer1.0.conv1.weight"])
    assert not content["state_dict"]["fc.weight"].equal(before["fc.weight"])
    assert content["lr"] < 5e-4


def test_options_of_timm(image_folder: Path, tmp_path: Path) -> None:
    options = ["--model", "test_resnet", "--data-dir", image_folder, "--output", tmp_path / "run", "--opt", "sgd"]
    options += ["--sched", "step", "--weight-decay", 1e-4, "--warmup-epochs", 0, "--drop-path", 0.1, "--smoothing", 0]
    options += ["--aa", "rand-m9-mstd0.5", "--mixup", 0.2, "--model-ema", "-b", 12, "-j", 0, "--epochs", 1]
    invoke(*options, "--recipe", "vanilla", "--img-size", 32)
    config = (tmp_path / "run" / "config.toml").read_text()
    for line in (
        *('optimizer = "sgd"', 'schedule = "step"', "weight_decay = 0.0001", "warmup_epochs = 0.0", "drop_path = 0.1"),
        *("label_smoothing = 0.0", 'auto_augment = "rand-m9-mstd0.5"', "mixup = 0.2", "ema_decay = 0.9998"),
    ):
        assert f"{line}\n" in config
