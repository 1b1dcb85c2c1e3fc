"""The form of a network that is exported: equal logits, fewer layers."""

import json
from collections import Counter
from pathlib import Path

import onnx
import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from export.config import ExportConfig
from export.inference_form import inference_form
from export.pipeline import export_checkpoint
from export.record import verification
from export.to_onnx import to_onnx
from runtime.graph.read import sha256_onnx
from runtime.spec import ModelSpec, Preprocessing
from tests.support.digit_files import write_digits


def randomized(arch: str) -> nn.Module:
    """Return a network whose BatchNorms are not the identity, like after training."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(arch, num_classes=10).eval()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.get_buffer("running_mean").uniform_(-0.1, 0.1)
            layer.get_buffer("running_var").uniform_(0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.2, 0.2)
    return model


def convolutions(model: nn.Module) -> int:
    return sum(isinstance(layer, nn.Conv2d) for layer in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "fewer"),
    [
        ("mobileone_s0", True),
        ("repvgg_a0", True),
        ("fastvit_t8", True),
        ("repvit_m1", True),
        ("repghostnet_050", False),  # its branches are BatchNorms
        ("tf_efficientnet_cc_b0_4e", False),  # CondConv, with TensorFlow's padding
    ],
)
def test_the_inference_form_has_the_same_logits(arch: str, fewer: bool) -> None:
    model = randomized(arch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    form = inference_form(model)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = model(images), form(images)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert form is not model
    assert (convolutions(form) < convolutions(model)) is fewer
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_network_without_another_form_is_returned_itself() -> None:
    model = randomized("test_resnet")
    assert inference_form(model) is model


@pytest.mark.slow
def test_an_export_is_reparameterized_and_verified_against_the_trained_network(tmp_path: Path) -> None:
    model = randomized("mobileone_s0")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "images").mkdir()
    write_digits(tmp_path / "images", 8)
    config = ExportConfig(
        arch="mobileone_s0", data=tmp_path / "images", sizes=None, out=tmp_path / "out", precision="fp16"
    )
    result = export_checkpoint(tmp_path / "weights.pth", config)
    nodes = Counter(node.op_type for node in onnx.load(result.onnx).graph.node)
    assert nodes["Conv"] < 50 < convolutions(model)
    assert result.onnx_parity.relative <= 1e-4
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert {entry["reparameterized"] for entry in record["files"].values()} == {True}
    assert verification(tmp_path / "out", sha256_onnx(result.onnx)).endswith(", re-parameterized")


@pytest.mark.slow
def test_conditional_convolutions_are_exported() -> None:
    model = randomized("tf_efficientnet_cc_b0_4e")
    spec = ModelSpec(
        arch="tf_efficientnet_cc_b0_4e",
        classes=tuple("0123456789"),
        preprocessing=Preprocessing(
            height=64, width=64, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0
        ),
    )
    graph = to_onnx(inference_form(model), spec)
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
