"""Names of models: runs, NAME=FILE, and files with equal names."""

from pathlib import Path

import pytest

from runtime.errors import ConfigError, DataError
from runtime.evaluate.names import find_model, unique_names


def run_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    for name in ("best.pt", "last.pt", "config.toml", "model.onnx", "model.int8.onnx"):
        (path / name).write_bytes(b"")
    return path


def test_models_are_named_by_their_run(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "advprop")
    for file, name in (
        ("", "advprop"),
        ("best.pt", "advprop"),
        ("last.pt", "advprop.last"),
        ("model.onnx", "advprop"),
        ("model.int8.onnx", "advprop.int8"),
    ):
        assert find_model(run / file).default_name() == name
    assert find_model(run).default_name("adv") == "advprop.adv"
    assert find_model(tmp_path / "toy.onnx").default_name() == "toy"
    assert find_model(f"released={run / 'model.onnx'}").default_name() == "released"


def test_equal_names_are_distinguished_without_hashes(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / place / "advprop") for place in ("old", "new")]
    assert unique_names([(find_model(run), "main") for run in runs]) == ["advprop-old", "advprop-new"]
    files = [find_model(runs[0] / name) for name in ("best.pt", "model.onnx")]
    assert unique_names([(file, "main") for file in files]) == ["advprop-pt", "advprop-onnx"]
    named = [find_model(f"a={run}") for run in runs]
    with pytest.raises(ConfigError, match="two models have the name a"):
        unique_names([(model, "main") for model in named])


def test_wrong_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder without a checkpoint"):
        find_model(tmp_path)
    with pytest.raises(ConfigError, match="a NAME that can be part of a file name"):
        find_model("a/b=x.onnx")
