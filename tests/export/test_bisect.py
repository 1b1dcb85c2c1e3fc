import numpy as np
import pytest
import timm
import torch

from export.bisect import module_errors
from export.to_onnx import to_onnx
from runtime.graph.compare import first_beyond
from runtime.spec import ModelSpec, Preprocessing
from tests.support.networks import scale_weight

IMAGES = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)


@pytest.mark.slow
def test_the_first_module_that_diverges_is_named() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4).eval()
    preprocessing = Preprocessing(
        height=32, width=32, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0
    )
    spec = ModelSpec(arch="resnet10t", classes=tuple("abcd"), preprocessing=preprocessing)
    exported = to_onnx(model, spec)
    errors = module_errors(model, exported, spec, IMAGES)
    assert len(errors) > 30
    assert first_beyond(errors, 1e-4) is None
    assert max(entry.error for entry in errors) > 0
    faulty = [node for node in exported.graph.node if node.op_type == "Conv"][5]
    scale_weight(exported, faulty.input[1])
    first = first_beyond(module_errors(model, exported, spec, IMAGES), 1e-4)
    assert first is not None
    assert (first.node, first.op, first.tensor) == ("layer2.0.bn1", "BatchNorm2d", faulty.output[0])
    assert first.error == pytest.approx(0.1, rel=0.2)
