import argparse
import logging
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from runtime.errors import CheckpointError, ConfigError
from tests.support.checkpoints import same
from train.checkpoint import load_checkpoint
from train.dual_bn import add_auxiliary_bns, select_route
from train.loop import FitResult
from train.weights import initialize, read_weights

CLASSES = ("a", "b", "c")


def network(arch: str = "test_resnet", classes: int = 3, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(arch, num_classes=classes)
    return model


def backbone(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights.items() if not name.startswith("fc.")}


@pytest.mark.parametrize("form", ["plain", "state_dict", "model", "model_ema", "timm", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod."])
def test_weights_of_every_form_are_loaded(tmp_path: Path, form: str, prefix: str) -> None:
    stored = network(classes=1000, seed=0).state_dict()
    content = {prefix + name: value for name, value in stored.items()}
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    if form == "safetensors":
        save_file(content, path)
    elif form == "timm":
        other = {name: torch.zeros_like(value) for name, value in content.items()}
        torch.save({"state_dict": other, "state_dict_ema": content, "args": argparse.Namespace(lr=1)}, path)
    elif form == "model_ema":  # as torchvision's reference scripts write it
        other = {name: torch.zeros_like(value) for name, value in content.items()}
        torch.save({"model": other, "model_ema": {**content, "n_averaged": torch.tensor(3)}}, path)
    else:
        torch.save(content if form == "plain" else {form: content, "epoch": 3}, path)
    model = network()
    result = initialize(model, path, "test_resnet", CLASSES)
    assert same(backbone(dict(model.state_dict())), backbone(stored))
    new = model.state_dict()["fc.weight"]
    assert 0.001 < new.std() < 0.02  # small: its first gradients must not destroy the other layers
    assert not model.state_dict()["fc.bias"].any()
    assert result.new_head == ("fc.weight", "fc.bias")
    assert result.missing == result.unused == ()


def test_what_was_loaded_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored = network(classes=1000).state_dict()
    del stored["conv1.0.weight" if "conv1.0.weight" in stored else "conv1.weight"]
    torch.save({**stored, "extra.weight": torch.zeros(1)}, tmp_path / "w.pt")
    with caplog.at_level(logging.INFO):
        result = initialize(network(), tmp_path / "w.pt", "test_resnet", CLASSES)
    assert len(result.missing) == 1
    assert result.unused == ("extra.weight",)
    assert f"loaded {len(result.loaded)} tensors, 1 stay random ({result.missing[0]})" in caplog.text
    assert "1 of the file are not used (extra.weight)" in caplog.text
    assert "the file has 1000 classes, and the images have 3 classes" in caplog.text


def test_a_file_without_a_classifier(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(backbone(network().state_dict()), tmp_path / "w.pt")
    with caplog.at_level(logging.INFO):
        assert initialize(network(), tmp_path / "w.pt", "test_resnet", CLASSES).new_head
    assert "the file has none, and the images have 3 classes" in caplog.text


def test_the_classifier_is_loaded_if_the_number_of_classes_is_the_same(tmp_path: Path) -> None:
    stored = network(seed=0).state_dict()
    torch.save(stored, tmp_path / "w.pt")
    model = network()
    assert initialize(model, tmp_path / "w.pt", "test_resnet", CLASSES).new_head == ()
    assert same(dict(model.state_dict()), dict(stored))


@pytest.mark.parametrize(("found", "expected"), [("resnet18", "resnet34"), ("test_efficientnet", "test_resnet")])
def test_weights_of_another_architecture_are_refused(tmp_path: Path, found: str, expected: str) -> None:
    torch.save(network(found).state_dict(), tmp_path / "w.pt")
    model = network(expected)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"w\.pt does not fit {expected}: \d+ of its \d+ tensors .*--arch"):
        initialize(model, tmp_path / "w.pt", expected, CLASSES)
    assert same(before, dict(model.state_dict()))


def test_a_checkpoint_of_another_architecture_is_refused(trained: FitResult) -> None:
    with pytest.raises(CheckpointError, match="is a checkpoint of resnet10t; expected test_resnet; train with --arch"):
        initialize(network(), trained.best, "test_resnet", CLASSES)


@pytest.mark.parametrize("route", ["main", "adv"])
def test_any_route_of_a_checkpoint(trained: FitResult, route: str) -> None:
    model = network("resnet10t", 10)
    initialize(model, trained.best, "resnet10t", tuple("0123456789"), route)
    expected = select_route(load_checkpoint(trained.best)["ema_state_dict"], route)
    assert same(dict(model.state_dict()), expected)
    # The auxiliary BatchNorms of the new run start as copies.
    routed = add_auxiliary_bns(model, ("adv",)).state_dict()
    assert same({**select_route(routed, "adv")}, expected)


def test_a_missing_route_is_refused(trained: FitResult) -> None:
    with pytest.raises(ConfigError, match=r"no BatchNorm route 'aug'; available: main, adv; choose .*init_route"):
        read_weights(trained.best, "aug")


class Bomb:
    """Unpickling it would create a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.mkdir, (str(self.path),)


def test_code_in_a_file_of_weights_is_not_executed(tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"state_dict": Bomb(tmp_path / "executed")}))
    with pytest.raises(CheckpointError, match="holds pickled Python objects"):
        read_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.safetensors", b"\x10\0\0\0\0\0\0\0{", "is not a complete .safetensors file"),
        ("none.safetensors", None, "no such file of weights"),
        ("none.pt", None, "no such checkpoint"),
        ("text.pth", b"hello", "is not a torch file"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, name: str, content: bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=expected):
        read_weights(tmp_path / name)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a folder; expected a file of weights; pass the file.*best\.pt"):
        read_weights(tmp_path)
