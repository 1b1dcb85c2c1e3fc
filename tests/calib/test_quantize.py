"""Q/DQ graphs against a simulation in NumPy and torch of the same scales."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch.nn import functional as F

import runtime
from calib.config import KINDS_LEFT, CalibrationConfig
from calib.placement import points_of, residual_inputs
from calib.ptq import calibrate
from calib.quantize import quantize, quantize_weight, scale_of
from calib.thresholds import LEVELS
from runtime.errors import ConfigError, ModelFileError
from runtime.graph.model import open_session
from tests.support.networks import graph


def random_network(seed: int) -> tuple[onnx.ModelProto, list[dict[str, object]]]:
    """A few convolutions of random kind, a Gemm; and the same as a list of layers."""
    random = np.random.default_rng(seed)
    body, weights, layers, channels, name = [], {}, [], 3, "input"
    for number in range(random.integers(2, 5)):
        groups = channels if number and random.random() < 0.4 else 1
        out = channels if groups > 1 else int(random.integers(2, 9))
        kernel, stride, relu = int(random.choice([1, 3])), int(random.choice([1, 2])), bool(random.random() < 0.7)
        weights[f"w{number}"] = random.normal(size=(out, channels // groups, kernel, kernel)).astype(np.float32)
        weights[f"b{number}"] = random.normal(size=out).astype(np.float32)
        pads = kernel // 2
        body.append(
            f"c{number} = Conv<group={groups}, strides=[{stride}, {stride}], pads=[{pads}, {pads}, {pads}, {pads}]>"
            f"({name}, w{number}, b{number})"
        )
        name = f"c{number}"
        if relu:
            body.append(f"r{number} = Relu({name})")
        layers.append({"groups": groups, "stride": stride, "pads": pads, "relu": relu, "number": number})
        name, channels = f"r{number}" if relu else name, out
    weights["wf"] = random.normal(size=(4, channels)).astype(np.float32)
    body.append(f"p = GlobalAveragePool({name}) f = Flatten(p) logits = Gemm<transB=1>(f, wf)")
    return graph(" ".join(body), 12, 12, **weights), layers


def fake(values: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
    return np.clip(np.round(values / scale), -LEVELS - 1, LEVELS) * scale


def simulated(layers: list[dict[str, object]], model: onnx.ModelProto, steps: dict[str, float], images: np.ndarray):
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    tensors = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type in ("Conv", "Gemm")}
    x = images.astype(np.float32)
    for layer in layers:
        number = layer["number"]
        integers, scales = quantize_weight(weights[f"w{number}"], 0)
        weight = integers.astype(np.float32) * scales.reshape(-1, 1, 1, 1)
        x = fake(x, np.float32(steps[tensors[f"c{number}"]]))
        x = F.conv2d(
            torch.from_numpy(x),
            torch.from_numpy(weight),
            torch.tensor(weights[f"b{number}"]),
            stride=layer["stride"],
            padding=layer["pads"],
            groups=layer["groups"],
        ).numpy()
        x = np.maximum(x, 0) if layer["relu"] else x
    integers, scales = quantize_weight(weights["wf"], 0)
    return fake(x.mean((2, 3)), np.float32(steps["f"])) @ (integers.astype(np.float32) * scales[:, None]).T


@pytest.mark.parametrize("seed", range(20))
def test_random_networks_are_what_numpy_makes_of_the_same_scales(seed: int) -> None:
    model, layers = random_network(seed)
    points = points_of(model)
    random = np.random.default_rng(100 + seed)
    thresholds = {point.tensor: float(random.uniform(0.5, 8)) for point in points}
    quantized = quantize(model, points, thresholds)
    images = random.normal(size=(3, 3, 12, 12)).astype(np.float32)
    steps = {name: float(scale_of(value)) for name, value in thresholds.items()}
    found = open_session(quantized).run(None, {"input": images})[0]
    expected = simulated(layers, model, steps, images)
    # A float rounding may carry one value over the border between two steps: one step of one tensor, times its weights.
    close = np.isclose(found, expected, rtol=1e-4, atol=1e-4)
    assert close.mean() > 0.9, np.abs(found - expected).max()
    np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())


def test_scales_are_fp16_numbers_that_clip_nothing_more() -> None:
    thresholds = np.geomspace(1e-5, 1e4, 500)
    scales = scale_of(thresholds)
    assert np.array_equal(scales.astype(np.float16).astype(np.float32), scales)
    assert (scales.astype(np.float64) >= thresholds / LEVELS).all()
    assert (scales[thresholds > 0.01] <= 1.001 * thresholds[thresholds > 0.01] / LEVELS).all()
    assert scale_of(0.0) > 0
    assert scale_of(1e9) == np.finfo(np.float16).max


def residual() -> onnx.ModelProto:
    random = np.random.default_rng(0)
    body = """a = Conv<pads=[1, 1, 1, 1]>(input, w1) r = Relu(a) b = Conv<pads=[1, 1, 1, 1]>(r, w2)
        s = Add(b, r) p = GlobalAveragePool(s) logits = Flatten(p)"""
    return graph(body, w1=random.normal(size=(4, 3, 3, 3)), w2=random.normal(size=(4, 4, 3, 3)))


def test_the_graph_keeps_tensorrts_rules() -> None:
    model = residual()
    points = points_of(model)
    assert [(point.node, point.tensor, point.macs) for point in points] == [
        ("Conv_0", "input", 64 * 4 * 27),
        ("Conv_2", "r", 64 * 4 * 36),
    ]
    assert residual_inputs(model, points) == [("Add_3", "r")]
    for residuals in ([], residual_inputs(model, points)):
        quantized = quantize(model, points, {"input": 3.0, "r": 5.0}, residuals=residuals)
        ops = [node.op_type for node in quantized.graph.node]
        assert (ops.count("QuantizeLinear"), ops.count("DequantizeLinear")) == (2, 4)  # `r` once for both its readers
        add = next(node for node in quantized.graph.node if node.op_type == "Add")
        assert ("r_dequantized" in add.input) == bool(residuals)
        constants = {tensor.name: tensor for tensor in quantized.graph.initializer}
        for node in quantized.graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                zero = constants[node.input[2]]
                assert zero.data_type == TensorProto.INT8
                assert not numpy_helper.to_array(zero).any()
        assert numpy_helper.to_array(constants["w1_int8"]).min() >= -LEVELS


def test_an_engine_can_be_built_of_it(tmp_path) -> None:
    quantized = quantize(residual(), points_of(residual()), {"input": 3.0, "r": 5.0})
    onnx.save(quantized, tmp_path / "m.onnx")
    info = runtime.build(tmp_path / "m.onnx", options=runtime.BuildOptions(precision="int8"), sm=(89,))
    assert (info.precision, info.precision_shares) == ("int8", {"int8": 1.0})


def test_a_node_can_be_kept() -> None:
    model = residual()
    points = points_of(model, keep=["Conv_2"])
    assert [(point.int8, point.reason) for point in points][1] == (False, "kept in floating point")
    ops = [node.op_type for node in quantize(model, points, {"input": 3.0}).graph.node]
    assert (ops.count("QuantizeLinear"), ops.count("DequantizeLinear")) == (1, 2)


def test_what_cannot_be_quantized_is_told() -> None:
    quantized = quantize(residual(), points_of(residual()), {"input": 3.0, "r": 5.0})
    with pytest.raises(ModelFileError, match="quantized already: it has DequantizeLinear, QuantizeLinear"):
        points_of(quantized)
    with pytest.raises(ModelFileError, match="nothing to quantize"):
        points_of(graph("p = GlobalAveragePool(input) logits = Flatten(p)"))


def inverted_residual() -> onnx.ModelProto:
    """A block of EfficientNet whose identity comes from a convolution."""
    random = np.random.default_rng(0)
    body = """x = Conv(input, w0) a = Conv(x, w1) r = Relu(a) d = Conv <pads = [1, 1, 1, 1], group = 6> (r, w2)
        g = GlobalAveragePool(d) e = Conv(g, w3) t = Sigmoid(e) z = Mul(d, t) p = Conv(z, w4) s = Add(p, x)
        q = GlobalAveragePool(s) f = Flatten(q) logits = Gemm(f, w5)"""
    shapes = {"w0": (4, 3, 1, 1), "w1": (6, 4, 1, 1), "w2": (6, 1, 3, 3), "w3": (6, 6, 1, 1), "w4": (4, 6, 1, 1)}
    return graph(body, **{name: random.normal(size=shape) for name, shape in shapes.items()}, w5=np.ones((4, 4)))


def test_kinds_of_layers_can_be_left() -> None:
    model = inverted_residual()
    left = {
        kind: {point.node: point.reason for point in points_of(model, leave=[kind]) if not point.int8}
        for kind in KINDS_LEFT
    }
    assert left == {
        "depthwise": {"Conv_3": "depthwise, left in floating point"},
        "gates": {"Conv_5": "reads one number a channel, as gates do, left in floating point"},
        "first": {"Conv_0": "the first layer, left in floating point"},
        "last": {"Gemm_12": "the last layer, left in floating point"},
    }
    with pytest.raises(ConfigError, match="layers can be left out by depthwise, gates, first, last; found 'middle'"):
        CalibrationConfig(leave=("middle",))


def test_what_a_residual_add_reads_is_quantized_too() -> None:
    model = inverted_residual()
    assert residual_inputs(model, points_of(model)) == [("Add_9", "x")]  # not p, which nobody else reads
    assert residual_inputs(model, points_of(model, keep=["Conv_8"])) == []
    images = np.random.default_rng(1).normal(size=(40, 3, 8, 8)).astype(np.float32)
    for residuals in (False, True):
        found = calibrate(model, lambda count: iter([images]), CalibrationConfig(residuals=residuals))
        add = next(node for node in found.model.graph.node if node.op_type == "Add")
        assert list(add.input) == ["p", "x_dequantized" if residuals else "x"]
    own = CalibrationConfig(residuals=True, keep=("Conv_1",))  # then no layer's output tells a threshold for x
    assert calibrate(model, lambda count: iter([images]), own).thresholds["x"] > 0
