import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.errors import CheckpointError
from runtime.spec import ModelSpec
from tests.support.checkpoints import same
from train.checkpoint import load_checkpoint, save_checkpoint
from train.config_file import from_mapping, read_toml
from train.loop import FitResult, Trainer
from train.reporting import SilentReporter
from train.state import preserve_rng, rng_state, set_rng_state


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def resumed(trained: FitResult, out: Path, **changes: Any) -> Trainer:
    """Return a trainer with the settings of a finished run, and copy its checkpoint."""
    config = from_mapping(read_toml(trained.last.parent / "config.toml"))
    save_checkpoint(out / "last.pt", load_checkpoint(trained.last))
    config = dataclasses.replace(config, out=out, resume="auto", tensorboard=False, **changes)
    return Trainer(config, SilentReporter(), torch.device("cpu"))


def test_saving_and_loading_restores_the_state(tmp_path: Path, trained: FitResult) -> None:
    state = resumed(trained, tmp_path).state
    state.load(trained.last)
    assert (state.epoch, state.batch, state.step) == (1, 0, 44)
    assert tuple(state.metrics) == trained.metrics
    state.save(tmp_path / "again.pt")
    first, second = load_checkpoint(trained.last), load_checkpoint(tmp_path / "again.pt")
    assert list(first) == list(second)
    assert [key for key in first if not same(first[key], second[key])] == ["config"]  # another `out`


@pytest.mark.parametrize(
    ("key", "value"),
    [("optimizer", {}), ("rng", 3), ("metrics", [{"epoch": 1}]), ("config", "a ="), ("batch", None), ("lr", "x")],
)
def test_a_damaged_value_is_an_error(tmp_path: Path, trained: FitResult, key: str, value: object) -> None:
    trainer = resumed(trained, tmp_path)
    save_checkpoint(tmp_path / "last.pt", {**load_checkpoint(tmp_path / "last.pt"), key: value})
    with pytest.raises(CheckpointError, match=r"cannot resume .*last\.pt: it is damaged"):
        trainer.state.load(tmp_path / "last.pt")


def test_other_settings_are_an_error(tmp_path: Path, trained: FitResult) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"other settings of the network.*recipe: advprop → vanilla.*new run from its weights: "
        r"python -m train\.run --config .*config\.toml --weights .*last\.pt --set recipe=vanilla --resume never --out ",
    ):
        resumed(trained, tmp_path, recipe="vanilla").run()


def test_another_dataset_is_an_error(tmp_path: Path, trained: FitResult) -> None:
    trainer = resumed(trained, tmp_path)
    content = load_checkpoint(tmp_path / "last.pt")
    spec = ModelSpec.from_json(content["spec"], where="")
    save_checkpoint(tmp_path / "last.pt", {**content, "spec": dataclasses.replace(spec, dataset="photos").to_json()})
    with pytest.raises(CheckpointError, match=r"dataset: photos → digits \(scikit-learn\)"):
        trainer.run()


def test_another_number_of_processes_is_reported(
    tmp_path: Path, trained: FitResult, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = resumed(trained, tmp_path)
    content = load_checkpoint(tmp_path / "last.pt")
    save_checkpoint(tmp_path / "last.pt", {**content, "rng": content["rng"] * 2})
    trainer.state.load(tmp_path / "last.pt")
    assert "2 processes wrote" in caplog.text


def test_random_state_round_trip(tmp_path: Path, trained: FitResult) -> None:
    save_checkpoint(tmp_path / "rng.pt", {**load_checkpoint(trained.last), "rng": rng_state()})
    expected = draw()
    set_rng_state(load_checkpoint(tmp_path / "rng.pt")["rng"])
    assert draw() == expected


def test_preserve_rng_restores_the_generators() -> None:
    before = rng_state()
    expected = draw()
    set_rng_state(before)
    with preserve_rng():
        draw()
    assert draw() == expected
