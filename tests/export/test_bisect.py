import numpy as np
import pytest
import timm
import torch

from export.bisect import first_module, module_errors
from export.source import Source
from export.to_onnx import to_onnx
from runtime.graph.compare import first_above
from runtime.spec import ModelSpec, Preprocessing
from tests.support.networks import scale_initializer

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
    assert first_above(errors, 1e-4) is None
    assert max(entry.error for entry in errors) > 0
    faulty = [node for node in exported.graph.node if node.op_type == "Conv"][5]
    scale_initializer(exported, faulty.input[1], 1.1)
    first = first_above(module_errors(model, exported, spec, IMAGES), 1e-4)
    assert first is not None
    assert (first.node, first.op, first.tensor) == ("layer2.0.bn1", "BatchNorm2d", faulty.output[0])
    assert first.error == pytest.approx(0.1, rel=0.2)
    pixels = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    sentence = first_module(Source(model=model, spec=spec, images_NHWC=pixels), exported)()
    assert sentence.startswith("The first layer that diverges is layer2.0.bn1 (BatchNorm2d), off by 0.1")
