import numpy as np
import onnx
import pytest

from calib.config import LAYER_KINDS
from calib.placement import int8_share, points_of, residual_inputs
from calib.quantize import quantize
from runtime.errors import ConfigError, ModelFileError
from tests.support.networks import classifier, graph


def inverted_residual() -> onnx.ModelProto:
    """Build an EfficientNet block whose identity branch comes from a convolution."""
    random = np.random.default_rng(0)
    body = """x = Conv(input, w0) a = Conv(x, w1) r = Relu(a) d = Conv <pads = [1, 1, 1, 1], group = 6> (r, w2)
        g = GlobalAveragePool(d) e = Conv(g, w3) t = Sigmoid(e) z = Mul(d, t) p = Conv(z, w4) s = Add(p, x)
        q = GlobalAveragePool(s) f = Flatten(q) logits = Gemm(f, w5)"""
    shapes = {"w0": (4, 3, 1, 1), "w1": (6, 4, 1, 1), "w2": (6, 1, 3, 3), "w3": (6, 6, 1, 1), "w4": (4, 6, 1, 1)}
    return graph(body, **{name: random.normal(size=shape) for name, shape in shapes.items()}, w5=np.ones((4, 4)))


def test_every_layer_has_a_point_with_its_input_weights_and_work() -> None:
    points = points_of(inverted_residual())
    assert [(point.node, point.tensor, point.weight, point.axis, point.macs) for point in points] == [
        ("Conv_0", "input", "w0", 0, 64 * 4 * 3),
        ("Conv_1", "x", "w1", 0, 64 * 6 * 4),
        ("Conv_3", "r", "w2", 0, 64 * 6 * 9),
        ("Conv_5", "g", "w3", 0, 6 * 6),
        ("Conv_8", "z", "w4", 0, 64 * 4 * 6),
        ("Gemm_12", "f", "w5", 1, 4 * 4),
    ]
    assert all(point.int8 for point in points)


def test_a_named_node_is_kept_in_floating_point() -> None:
    points = points_of(inverted_residual(), keep=["Conv_3"])
    assert [(point.node, point.reason) for point in points if not point.int8] == [("Conv_3", "kept in floating point")]
    macs = {point.node: point.macs for point in points}
    assert int8_share(points) == pytest.approx(1 - macs["Conv_3"] / sum(macs.values()))
    with pytest.raises(ConfigError, match=r"no convolution or matrix product is called 'Conv_4'; did you mean Conv_"):
        points_of(inverted_residual(), keep=["Conv_4"])


def test_kinds_of_layers_are_kept_in_floating_point() -> None:
    model = inverted_residual()
    kept = {kind: [point.node for point in points_of(model, leave=[kind]) if not point.int8] for kind in LAYER_KINDS}
    assert kept == {"depthwise": ["Conv_3"], "gates": ["Conv_5"], "first": ["Conv_0"], "last": ["Gemm_12"]}
    (depthwise,) = (point for point in points_of(model, leave=["depthwise"]) if not point.int8)
    assert depthwise.reason == "kept in floating point: depthwise convolution"


def test_the_other_input_of_a_residual_add_is_found() -> None:
    model = inverted_residual()
    assert residual_inputs(model, points_of(model)) == [("Add_9", "x")]  # not `p`: TensorRT fuses the Add into Conv_8
    assert residual_inputs(model, points_of(model, keep=["Conv_8"])) == []


def test_layers_without_constant_weights_are_not_quantized() -> None:
    body = """a = Conv(input, w) v = Identity(w) b = Conv(input, v) s = Add(a, b)
        p = GlobalAveragePool(s) logits = Flatten(p)"""
    points = points_of(graph(body, w=np.ones((4, 3, 3, 3))))
    assert [(point.int8, point.weight) for point in points] == [(True, "w"), (False, "")]
    assert points[1].reason == "its weights are not constant"


def test_models_without_quantizable_layers_are_refused() -> None:
    quantized = quantize(classifier(), points_of(classifier()), {"input": 3.0})
    with pytest.raises(ModelFileError, match="already quantized: it has DequantizeLinear, QuantizeLinear"):
        points_of(quantized)
    with pytest.raises(ModelFileError, match="nothing to quantize"):
        points_of(graph("p = GlobalAveragePool(input) logits = Flatten(p)"))
    with pytest.raises(ModelFileError, match="nothing to quantize"):
        points_of(classifier(), keep=["Conv_0"])
    unnamed = classifier()
    unnamed.graph.node[0].name = ""
    with pytest.raises(ModelFileError, match="must have unique names"):
        points_of(unnamed)
