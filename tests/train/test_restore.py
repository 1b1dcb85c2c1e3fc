from pathlib import Path

import pytest
import timm
import torch

from runtime.errors import CheckpointError
from train.checkpoint import load_checkpoint
from train.dual_bn import route
from train.loop import FitResult
from train.restore import restore_model, route_weights


def test_both_routes_come_back(trained: FitResult) -> None:
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


def test_the_moving_average_is_preferred(trained: FitResult) -> None:
    content = load_checkpoint(trained.last)
    content["ema_state_dict"] = {key: value + 1 for key, value in content["state_dict"].items()}
    key = next(iter(content["state_dict"]))
    assert torch.equal(route_weights(content)[key], content["ema_state_dict"][key])
    assert torch.equal(route_weights(content, ema=False)[key], content["state_dict"][key])


def test_what_does_not_fit_is_named(trained: FitResult) -> None:
    content = {**load_checkpoint(trained.last), "ema_state_dict": None}
    with pytest.raises(CheckpointError, match=r"do not fit timm's resnet10t: .*extra"):
        restore_model({**content, "state_dict": {**content["state_dict"], "extra": torch.zeros(1)}}, Path("x.pt"))
    with pytest.raises(CheckpointError, match="has model_kwargs"):
        restore_model({**content, "model_kwargs": {"checkpoint_path": "evil"}}, Path("x.pt"))
    with pytest.raises(CheckpointError, match="routes that cannot be"):
        evil = {**content["state_dict"], "bn1.aux.a-b.weight": torch.zeros(1)}
        restore_model({**content, "state_dict": evil}, Path("x.pt"), routes=True)
