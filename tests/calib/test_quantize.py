"""Q/DQ graphs against a simulation in NumPy and torch with the same scales."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch.nn import functional as F

import runtime
from calib.placement import points_of, residual_inputs
from calib.precision import to_reduced
from calib.quantize import quantize, quantize_weight, scale_of
from calib.thresholds import LEVELS
from runtime.graph.model import run_batches
from tests.support.networks import graph


def random_network(seed: int) -> tuple[onnx.ModelProto, list[dict[str, int]]]:
    """Return a network of a few random convolutions and a Gemm, and the settings of its convolutions."""
    random = np.random.default_rng(seed)
    body, channels, name = [], 3, "input"
    weights: dict[str, np.ndarray] = {}
    layers: list[dict[str, int]] = []
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


def rounded(values: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
    return np.clip(np.round(values / scale), -LEVELS - 1, LEVELS) * scale


def simulated(
    layers: list[dict[str, int]], model: onnx.ModelProto, steps: dict[str, float], images: np.ndarray
) -> np.ndarray:
    """Return the logits of the network of `random_network` with INT8 inputs and weights."""
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    tensors = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type in ("Conv", "Gemm")}
    x = images.astype(np.float32)
    for layer in layers:
        number = layer["number"]
        integers, scales = quantize_weight(weights[f"w{number}"], 0)
        weight = integers.astype(np.float32) * scales.reshape(-1, 1, 1, 1)
        x = rounded(x, np.asarray(steps[tensors[f"c{number}"]], np.float32))
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
    return (
        rounded(x.mean((2, 3)), np.asarray(steps["f"], np.float32)) @ (integers.astype(np.float32) * scales[:, None]).T
    )


@pytest.mark.parametrize("seed", range(20))
def test_random_networks_match_the_simulation(seed: int) -> None:
    model, layers = random_network(seed)
    points = points_of(model)
    random = np.random.default_rng(100 + seed)
    thresholds = {point.tensor: float(random.uniform(0.5, 8)) for point in points}
    quantized = quantize(model, points, thresholds)
    images = random.normal(size=(3, 3, 12, 12)).astype(np.float32)
    steps = {name: float(scale_of(value)) for name, value in thresholds.items()}
    found = run_batches(quantized, [images])
    expected = simulated(layers, model, steps, images)
    # A float rounding can move a value into the next step, which changes a logit by that step times a weight.
    close = np.isclose(found, expected, rtol=1e-4, atol=1e-4)
    assert close.mean() > 0.9, np.abs(found - expected).max()
    np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())


def test_scales_are_fp16_numbers_rounded_up() -> None:
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


@pytest.mark.parametrize("with_residuals", [False, True])
def test_pairs_are_placed_as_tensorrt_requires(with_residuals: bool) -> None:
    model = residual()
    points = points_of(model)
    residuals = residual_inputs(model, points) if with_residuals else []
    quantized = quantize(model, points, {"input": 3.0, "r": 5.0}, residuals=residuals)
    ops = [node.op_type for node in quantized.graph.node]
    assert (ops.count("QuantizeLinear"), ops.count("DequantizeLinear")) == (2, 4)  # both readers of `r` share a pair
    add = next(node for node in quantized.graph.node if node.op_type == "Add")
    assert ("r_dequantized" in add.input) == with_residuals
    constants = {tensor.name: tensor for tensor in quantized.graph.initializer}
    for node in quantized.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = constants[node.input[2]]
            assert zero.data_type == TensorProto.INT8
            assert not numpy_helper.to_array(zero).any()
    assert numpy_helper.to_array(constants["w1_int8"]).min() >= -LEVELS


def test_layers_kept_in_floating_point_have_no_pairs() -> None:
    model = residual()
    points = points_of(model, keep=["Conv_2"])
    ops = [node.op_type for node in quantize(model, points, {"input": 3.0}).graph.node]
    assert (ops.count("QuantizeLinear"), ops.count("DequantizeLinear")) == (1, 2)


def test_an_engine_of_a_quantized_graph_is_int8(tmp_path: Path) -> None:
    quantized = quantize(residual(), points_of(residual()), {"input": 3.0, "r": 5.0})
    onnx.save(quantized, tmp_path / "m.onnx")
    info = runtime.build(tmp_path / "m.onnx", options=runtime.BuildOptions(precision="int8"), sm=(89,))
    assert (info.precision, info.precision_shares) == ("int8", {"int8": 1.0})


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 20.0), (0.5, 0.25), (1.0, 0.0)])
def test_a_corrected_bias_is_divided_by_the_factor_of_the_bias(alpha: float, beta: float) -> None:
    body = f"p = GlobalAveragePool(input) f = Flatten(p) logits = Gemm <alpha = {alpha}, beta = {beta}> (f, w, b)"
    model = graph(body, w=np.ones((3, 4)), b=np.arange(4))
    assert_shifted_by_correction(model, "Gemm_2")


@pytest.mark.parametrize(
    "tail", ["logits = MatMul(f, w)", "m = MatMul(f, w) logits = Add(m, b)", "m = MatMul(f, w) logits = Relu(m)"]
)
def test_a_matrix_product_without_a_bias_gets_one(tail: str) -> None:
    model = graph(f"p = GlobalAveragePool(input) f = Flatten(p) {tail}", w=np.ones((3, 4)), b=np.arange(4))
    if "b" not in model.graph.node[-1].input:
        del model.graph.initializer[1]
    quantized = assert_shifted_by_correction(model, "MatMul_2")
    adds = [node for node in quantized.graph.node if node.op_type == "Add"]
    assert len(adds) == 1


def assert_shifted_by_correction(model: onnx.ModelProto, node: str) -> onnx.ModelProto:
    """Check that a correction of a layer is added to its output; return the quantized model."""
    correction = np.asarray([1.0, 2.0, 3.0, 4.0])
    points = points_of(model)
    plain = quantize(model, points, {"f": 3.0})
    corrected = quantize(model, points, {"f": 3.0}, biases={node: correction})
    batch = np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32) + 1
    difference = run_batches(corrected, [batch]) - run_batches(plain, [batch])
    np.testing.assert_allclose(difference, np.broadcast_to(correction, (3, 4)), atol=1e-5)
    return corrected


@pytest.mark.parametrize("suffix", ["_scale", "_zero", "_int8", "_dequantized", "_quantize"])
def test_names_of_the_graph_are_not_used_again(suffix: str) -> None:
    model = graph(
        f"""r = Relu(input) "r{suffix}" = Neg(r) a = Conv(r, w) b = Conv("r{suffix}", "w{suffix}")
        s = Add(a, b) p = GlobalAveragePool(s) logits = Flatten(p)""".replace('"', ""),
        **{"w": np.ones((4, 3, 1, 1)), f"w{suffix}": np.full((4, 3, 1, 1), 0.5)},
    )
    model.graph.node[1].name = f"r{suffix}"
    thresholds = {"r": 3.0, f"r{suffix}": 3.0}
    quantized = quantize(model, points_of(model), thresholds)
    batch = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(run_batches(quantized, [batch]), run_batches(model, [batch]), atol=0.05)
    half = to_reduced(quantized, "fp16")
    names = [node.name for node in half.graph.node]
    assert len(set(names)) == len(names)
