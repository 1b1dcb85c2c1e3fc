import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import numpy_helper

from export.divergence import first_beyond, graph_errors, module_errors
from export.precision import to_reduced
from export.rounding import rounded_name, with_roundings
from export.to_onnx import to_onnx
from runtime.spec import ModelSpec, Preprocessing
from tests.networks import graph

IMAGES = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)


def scaled(model: onnx.ModelProto, name: str) -> None:
    """A fault: one weight is not what it should be."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.1), name))


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
    scaled(exported, faulty.input[1])
    first = first_beyond(module_errors(model, exported, spec, IMAGES), 1e-4)
    assert first is not None
    assert (first.node, first.op, first.tensor) == ("layer2.0.bn1", "BatchNorm2d", faulty.output[0])
    assert first.error == pytest.approx(0.1, rel=0.2)


def network() -> onnx.ModelProto:
    random = np.random.default_rng(0)
    body = """a = Conv(input, w1) r = Relu(a) b = Conv(r, w2) s = Sigmoid(b)
        p = GlobalAveragePool(s) logits = Flatten(p)"""
    return graph(body, 32, 32, w1=random.normal(size=(8, 3, 3, 3)), w2=random.normal(size=(4, 8, 1, 1)))


def test_equal_graphs_do_not_diverge() -> None:
    errors = graph_errors(network(), network(), IMAGES)
    assert [entry.tensor for entry in errors] == ["a", "r", "b", "s", "p", "logits"]
    assert {(entry.error, entry.added) for entry in errors} == {(0.0, 0.0)}


def test_the_first_node_that_diverges_is_named_and_adds_most() -> None:
    faulty = network()
    scaled(faulty, "w2")
    errors = graph_errors(network(), faulty, IMAGES)
    first = first_beyond(errors, 1e-4)
    assert first is not None
    assert (first.node, first.tensor) == ("Conv_2", "b")
    assert max(errors, key=lambda entry: entry.added) == first


def test_nan_and_overflow_count_as_divergence() -> None:
    large = network()
    tensor = next(tensor for tensor in large.graph.initializer if tensor.name == "w1")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1e4), "w1"))
    rounded = with_roundings(to_reduced(large, "fp16"))
    first = first_beyond(graph_errors(large, rounded, IMAGES, rounded_name), 2e-2)
    assert first is not None
    assert (first.tensor, first.error) == ("r", float("inf"))
    assert first.op == "Relu"
