"""The input size of a run, found by trying it on the network."""

import logging

import pytest
import timm
import torch

from runtime.errors import ConfigError
from runtime.spec import Preprocessing
from train.build import make_preprocessing
from train.config import DataConfig, TrainConfig
from train.data import embedded_digits


def chosen(arch: str, img_size: int | None = None) -> Preprocessing:
    with torch.device("meta"):
        model = timm.create_model(arch)
    return make_preprocessing(TrainConfig(arch=arch, data=DataConfig(img_size=img_size)), embedded_digits(), model)


def test_an_automatic_size_that_is_too_small_is_enlarged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        spec = chosen("inception_v3")
    assert (spec.height, spec.width, spec.crop_pct) == (96, 96, 1.0)
    assert "input size: 96 px, the smallest multiple of 32 px that inception_v3 accepts" in caplog.text
    assert "at 32 px: " in caplog.text


def test_a_size_that_works_stays(caplog: pytest.LogCaptureFixture) -> None:
    assert chosen("test_resnet").height == 32
    assert chosen("test_resnet", 56).height == 56


def test_a_requested_size_that_does_not_work_is_an_error_with_the_next_size() -> None:
    with pytest.raises(ConfigError, match=r"--img-size 50: dla46x_c does not accept .*--img-size 64"):
        chosen("dla46x_c", 50)
    with pytest.raises(ConfigError, match=r"--img-size 100: halonet_h1 .*AssertionError.*--img-size 256"):
        chosen("halonet_h1", 100)
