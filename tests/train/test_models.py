from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from runtime.errors import ArchError, BackendUnavailable, CheckpointError, ConfigError
from train.checkpoint import load_checkpoint
from train.dual_bn import route
from train.loop import FitResult
from train.models import (
    create_model,
    next_working_size,
    resolve_device,
    restore_model,
    route_weights,
    to_channels_last,
    unsupported_size,
)


def test_both_routes_are_restored(trained: FitResult) -> None:
    content = load_checkpoint(trained.last)
    stock, routed = (restore_model(content, trained.last, routes=routes).eval() for routes in (False, True))
    assert type(stock) is type(timm.create_model(content["arch"]))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        plain = stock(images)
        assert torch.equal(routed(images), plain)
        with route(routed, "adv"):
            assert not torch.equal(routed(images), plain)
    assert routed.state_dict().keys() == content["state_dict"].keys()


def test_moving_average_is_preferred(trained: FitResult) -> None:
    content = load_checkpoint(trained.last)
    content["ema_state_dict"] = {key: value + 1 for key, value in content["state_dict"].items()}
    key = next(iter(content["state_dict"]))
    assert torch.equal(route_weights(content)[key], content["ema_state_dict"][key])
    assert torch.equal(route_weights(content, ema=False)[key], content["state_dict"][key])


def test_mismatch_of_weights_is_reported(trained: FitResult) -> None:
    content = {**load_checkpoint(trained.last), "ema_state_dict": None}
    with pytest.raises(CheckpointError, match=r"do not fit timm's resnet10t: .*extra"):
        restore_model({**content, "state_dict": {**content["state_dict"], "extra": torch.zeros(1)}}, Path("x.pt"))
    with pytest.raises(CheckpointError, match="has model_kwargs"):
        restore_model({**content, "model_kwargs": {"checkpoint_path": "evil"}}, Path("x.pt"))
    with pytest.raises(CheckpointError, match="invalid BatchNorm routes"):
        evil = {**content["state_dict"], "bn1.aux.a-b.weight": torch.zeros(1)}
        restore_model({**content, "state_dict": evil}, Path("x.pt"), routes=True)


def test_unknown_architecture_suggests_the_nearest() -> None:
    with pytest.raises(ArchError, match="did you mean resnet10t"):
        create_model("resnet10tt")
    with pytest.raises(ArchError, match="timm cannot create resnet10t with"):
        create_model("resnet10t", nonsense=1)


def test_device_names_are_resolved() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="--device 'gpu' is not a torch device"):
        resolve_device("gpu")
    with pytest.raises(ConfigError, match="--device meta cannot be used here"):
        resolve_device("meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_cuda_without_a_gpu_is_an_error(name: str) -> None:
    with pytest.raises(BackendUnavailable, match=rf"--device {name}: torch .* finds no NVIDIA GPU; use --device cpu"):
        resolve_device(name)


def test_input_sizes_are_tried_without_computing() -> None:
    assert unsupported_size("test_resnet", 32) == ""
    assert "Kernel size can't be greater than actual input size" in unsupported_size("inception_v3", 64)
    assert next_working_size("inception_v3", 64, 299) == 96
    assert next_working_size("inception_v3", 32, 64) is None


def test_channels_last_layout_leaves_volumes_and_values_unchanged() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(4, 2, 3), nn.Linear(2, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert to_channels_last(model) is model
    weight = model.get_parameter("0.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert model.get_parameter("1.weight").is_contiguous()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
