"""Twelve families of networks, each from timm to an FP16 engine at a small size."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import timm
import torch
from torch import nn

import runtime
from calib.precision import overflows, to_reduced
from export.to_onnx import to_onnx
from export.verify import TOLERANCE, compare
from runtime.graph.collect import collect
from runtime.graph.model import save_onnx
from runtime.graph.rounding import with_roundings
from runtime.spec import ModelSpec, Preprocessing

FAMILIES = {
    "efficientnet_b0": 64,
    "tf_efficientnet_b0": 64,  # TensorFlow's asymmetric padding
    "tf_efficientnetv2_b0": 64,
    "tf_efficientnet_lite0": 64,
    "resnet18": 64,
    "resnext26ts": 64,
    "regnety_002": 64,
    "mobilenetv3_small_050": 64,
    "densenet121": 64,  # BatchNorm before the convolution
    "inception_v3": 96,
    "nf_regnet_b0": 64,  # no BatchNorm: weights are standardized
    "convnext_atto": 64,  # no BatchNorm
}


OVERFLOWS = ("inception_v3",)
"""Their random weights cause activations beyond the range of FP16."""


def used(arch: str) -> nn.Module:
    """Return a model whose BatchNorms have statistics and weights like after training."""
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=10).train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, FAMILIES[arch], FAMILIES[arch]))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("arch", FAMILIES)
def test_a_family_is_exported_to_an_engine(arch: str, tmp_path: Path) -> None:
    model, size = used(arch), FAMILIES[arch]
    spec = ModelSpec(
        arch=arch,
        classes=tuple("0123456789"),
        preprocessing=Preprocessing(
            height=size, width=size, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0
        ),
    )
    proto = to_onnx(model, spec)
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    images = np.random.default_rng(0).normal(size=(16, 3, size, size)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    ranges, logits = collect(proto, [images])
    full = compare(expected, logits)
    assert full.relative <= TOLERANCE["fp32"]
    decisions = overflows(proto, ranges)
    half = to_reduced(proto, "fp16", decisions)
    assert bool(decisions) == (arch in OVERFLOWS)
    session = ort.InferenceSession(with_roundings(half).SerializeToString(), providers=["CPUExecutionProvider"])
    rounded = compare(logits, session.run(None, {"input": images})[0])
    assert rounded.relative <= TOLERANCE["fp16"]
    save_onnx(half, tmp_path / "model.onnx")
    info = runtime.build(tmp_path / "model.onnx", sm=(86,))
    assert info.precision_shares["fp16"] == 1.0 or arch in OVERFLOWS
    assert (tmp_path / "model.engine").stat().st_size > 1e6
