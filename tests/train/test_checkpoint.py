import argparse
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.errors import CheckpointError, OutputError
from train.checkpoint import load_checkpoint, plain_state_dict, read_torch_file, save_checkpoint
from train.loop import FitResult

CONTENT = {
    "arch": "resnet10t",
    "model_kwargs": {"num_classes": 2},
    "recipe": "advprop",
    "spec": "{}",
    "state_dict": {"weight": torch.arange(3.0)},
    "epoch": 1,
    "step": 2,
    "sample": {"images": torch.zeros(1, 8, 8, 3, dtype=torch.uint8)},
}


class Bomb:
    """Unpickling it would create a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_round_trip(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", CONTENT)
    found = load_checkpoint(tmp_path / "a.pt")
    assert found["format"] == "advprop.checkpoint/1"
    assert torch.equal(found["state_dict"]["weight"], torch.arange(3.0))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_real_checkpoint_has_the_documented_keys(trained: FitResult) -> None:
    checkpoint = torch.load(trained.last, weights_only=True)
    assert set(checkpoint) >= {
        *("format", "arch", "model_kwargs", "spec", "recipe", "state_dict", "ema_state_dict", "optimizer"),
        *("scheduler", "scaler", "epoch", "step", "rng", "versions", "sample"),
    }
    assert any(".aux.adv." in key for key in checkpoint["state_dict"])
    assert checkpoint["ema_state_dict"].keys() == checkpoint["state_dict"].keys()
    assert checkpoint["sample"]["images"].shape == (64, 32, 32, 3)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_refused_and_not_executed(tmp_path: Path, legacy: bool) -> None:
    path, trap = tmp_path / "evil.pt", tmp_path / "executed"
    if legacy:
        path.write_bytes(pickle.dumps({"format": "advprop.checkpoint/1", "state_dict": Bomb(trap)}))
    else:
        torch.save({"format": "advprop.checkpoint/1", "state_dict": Bomb(trap)}, path)
    with pytest.raises(CheckpointError, match=r"holds pickled Python objects.*rejected and nothing was executed"):
        load_checkpoint(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("empty", "is empty"),
        ("text", "not a torch file"),
        ("half", "truncated or damaged"),
        ("zip", "truncated or damaged"),
        ("missing", "no such checkpoint"),
        ("state_dict", "plain state_dict of 1 tensors.*--arch"),
        ("list", "it holds a list"),
        ("other", "it is a dict with model, optimizer"),
        ("incomplete", "lacks arch"),
    ],
)
def test_files_that_are_not_advprop_checkpoints(tmp_path: Path, trained: FitResult, name: str, expected: str) -> None:
    path = tmp_path / f"{name}.pt"
    whole = trained.last.read_bytes()
    contents = {"empty": b"", "text": b"hello, world", "half": whole[: len(whole) // 2], "zip": b"PK\x03\x04rubbish"}
    objects = {
        "state_dict": {"weight": torch.zeros(2)},
        "list": [1, 2],
        "other": {"model": 1, "optimizer": 2},
        "incomplete": {"format": "advprop.checkpoint/1"},
    }
    if name in contents:
        path.write_bytes(contents[name])
    elif name in objects:
        torch.save(objects[name], path)
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("arch", 3, "arch must be of type str; found int"),
        ("spec", None, "spec must be of type str; found NoneType"),
        ("state_dict", [1], "state_dict must be a dict of tensors; found list"),
        ("state_dict", {"weight": 1}, "state_dict must be a dict of tensors; found dict"),
        ("epoch", "1", "epoch must be of type int; found str"),
    ],
)
def test_values_of_other_types_are_refused(tmp_path: Path, key: str, value: object, expected: str) -> None:
    save_checkpoint(tmp_path / "a.pt", {**CONTENT, key: value})
    with pytest.raises(CheckpointError, match=rf"a\.pt is damaged: {expected}"):
        load_checkpoint(tmp_path / "a.pt")


def test_the_settings_in_a_file_of_timms_train_script_are_read(tmp_path: Path) -> None:
    """It stores its command line as an argparse.Namespace, which can hold values only."""
    weights = {"weight": torch.arange(3.0)}
    torch.save({"state_dict": weights, "args": argparse.Namespace(model="resnet10t", lr=0.1)}, tmp_path / "best.tar")
    content = read_torch_file(tmp_path / "best.tar")
    assert (content["args"].model, content["args"].lr) == ("resnet10t", 0.1)
    assert torch.equal(plain_state_dict(content, tmp_path)["weight"], weights["weight"])


def test_code_inside_a_namespace_is_refused(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    torch.save({"state_dict": {}, "args": argparse.Namespace(model=Bomb(trap))}, tmp_path / "evil.tar")
    with pytest.raises(CheckpointError, match="holds pickled Python objects"):
        read_torch_file(tmp_path / "evil.tar")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("prefix", "removed"),
    [
        ("", ""),
        ("module.", "module."),
        ("_orig_mod.", "_orig_mod."),
        ("module._orig_mod.", "module., _orig_mod."),
        ("_orig_mod.module.", "_orig_mod., module."),
        ("model.", "model."),
    ],
)
@pytest.mark.parametrize("nested", ["", "state_dict", "model"])
def test_prefixes_of_wrapped_networks_are_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, prefix: str, removed: str, nested: str
) -> None:
    content: dict[str, Any] = {f"{prefix}conv.weight": torch.zeros(2), f"{prefix}module.bias": torch.ones(1)}
    with caplog.at_level(logging.INFO):
        weights = plain_state_dict({nested: content} if nested else content, tmp_path / "a.pt")
    assert list(weights) == ["conv.weight", "module.bias"]
    assert caplog.messages == (
        [f"{tmp_path / 'a.pt'}: removed {removed} from the names of the weights"] * bool(removed)
    )


def test_prefixes_of_compiled_layers_are_removed(tmp_path: Path) -> None:
    content = {"conv.weight": torch.zeros(2), "layer1._orig_mod.0._orig_mod.weight": torch.ones(1)}
    assert list(plain_state_dict(content, tmp_path)) == ["conv.weight", "layer1.0.weight"]


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_file_always_raises_checkpoint_error(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    path = tmp_path / "damaged.pth"
    torch.save({"state_dict": {"weight": torch.arange(99.0)}}, path, _use_new_zipfile_serialization=bool(seed % 2))
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    content[random.integers(0, len(content), 20)] ^= random.integers(1, 255, 20, dtype=np.uint8)
    path.write_bytes(content.tobytes()[: random.integers(4, len(content))])
    with pytest.raises(CheckpointError, match=r"damaged\.pth"):
        load_checkpoint(path)


def test_a_torchscript_archive_is_recognized(tmp_path: Path) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(tmp_path / "script.pt"))
    with pytest.raises(CheckpointError, match="is a TorchScript archive"):
        load_checkpoint(tmp_path / "script.pt")


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        save_checkpoint(tmp_path / "no" / "such" / "folder.pt", CONTENT)


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", CONTENT)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(tmp_path / "a.pt", {**CONTENT, "epoch": lambda: None})
    assert load_checkpoint(tmp_path / "a.pt")["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
