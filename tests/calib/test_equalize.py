import numpy as np
import onnx
import pytest

from calib.equalize import equalizable_tensors, equalize
from calib.placement import points_of
from calib.precision import to_reduced
from runtime.graph.collect import collect_channel_amax
from runtime.graph.model import run_batches
from runtime.graph.rounding import with_roundings
from tests.support.networks import graph

RANDOM = np.random.default_rng(0)
SPREAD = np.geomspace(0.01, 10, 6)[:, None, None, None]
"""Scales that give output channels very different ranges."""
IMAGES = np.random.default_rng(1).normal(size=(8, 3, 8, 8)).astype(np.float32)


def squeeze_and_excitation() -> onnx.ModelProto:
    """Build an EfficientNet block: convolution, SiLU, depthwise, SiLU, gate from the pooled tensor, projection."""
    body = """
        a = Conv(input, w1, b1)  sa = Sigmoid(a)  x = Mul(a, sa)
        d = Conv <pads = [1, 1, 1, 1], group = 6> (x, w2, b2)  sd = Sigmoid(d)  y = Mul(d, sd)
        pooled = ReduceMean <keepdims = 1> (y, axes)  r = Conv(pooled, w3)  sr = Sigmoid(r)  q = Mul(r, sr)
        e = Conv(q, w4)  gate = Sigmoid(e)  z = Mul(y, gate)
        p = Conv(z, w5)  g = GlobalAveragePool(p)  logits = Flatten(g)
    """
    weights = {
        "w1": RANDOM.normal(size=(6, 3, 3, 3)) * SPREAD,
        "b1": RANDOM.normal(size=6),
        "w2": RANDOM.normal(size=(6, 1, 3, 3)) * SPREAD[::-1],
        "b2": RANDOM.normal(size=6),
        "w3": RANDOM.normal(size=(2, 6, 1, 1)),
        "w4": RANDOM.normal(size=(6, 2, 1, 1)),
        "w5": RANDOM.normal(size=(4, 6, 1, 1)),
    }
    model = graph(body, **weights)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray([2, 3]), "axes"))
    return model


def network(activation: str) -> onnx.ModelProto:
    """Build convolution, activation from `a` to `x`, convolution."""
    body = f"a = Conv(input, w1, b1) {activation} c = Conv(x, w2) p = GlobalAveragePool(c) logits = Flatten(p)"
    weights = {"w1": RANDOM.normal(size=(6, 3, 3, 3)) * SPREAD, "b1": RANDOM.normal(size=6)}
    return graph(body, w2=RANDOM.normal(size=(4, 6, 1, 1)), zero=np.zeros(()), six=np.full((), 6.0), **weights)


def maxima_of(model: onnx.ModelProto, *tensors: str) -> dict[str, np.ndarray]:
    return collect_channel_amax(model, [IMAGES], tensors)


def spread_of(model: onnx.ModelProto, tensor: str) -> float:
    maxima = maxima_of(model, tensor)[tensor]
    return float(maxima.max() / maxima[maxima > 0].min())


def assert_same_output(model: onnx.ModelProto, changed: onnx.ModelProto) -> None:
    np.testing.assert_array_equal(run_batches(changed, [IMAGES]), run_batches(model, [IMAGES]))


def test_activations_of_a_block_that_can_be_scaled() -> None:
    model = squeeze_and_excitation()
    tensors = [point.tensor for point in points_of(model)]
    assert equalizable_tensors(model, tensors) == ["x", "q", "z"]  # not `pooled`: `z` depends on `y` too


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_silu_and_gates_are_equalized_without_changing_a_bit_of_the_output(alpha: float) -> None:
    model = squeeze_and_excitation()
    maxima = maxima_of(model, "x", "q", "z")
    changed = equalize(model, maxima, dict.fromkeys(maxima, alpha))
    assert_same_output(model, changed)
    for tensor in ("x", "z"):
        assert spread_of(changed, tensor) < spread_of(model, tensor) / (1.5 if alpha < 1 else 4)
    assert {point.node for point in points_of(changed)} == {point.node for point in points_of(model)}


@pytest.mark.parametrize(
    "activation", ["x = Relu(a)", "x = HardSwish(a)", "m = MaxPool<kernel_shape=[2, 2]>(a) x = Relu(m)"]
)
def test_activations_through_which_a_scale_passes(activation: str) -> None:
    model = network(activation)
    assert equalizable_tensors(model, ["x"]) == ["x"]
    changed = equalize(model, maxima_of(model, "x"), {"x": 1.0})
    assert_same_output(model, changed)
    assert spread_of(changed, "x") < spread_of(model, "x")


@pytest.mark.parametrize("activation", ["x = Clip(a, zero, six)", "x = Tanh(a)", "x = Add(a, a)"])
def test_activations_that_cannot_be_scaled_exactly(activation: str) -> None:
    assert equalizable_tensors(network(activation), ["x"]) == []


def test_an_equalized_hard_swish_can_be_converted_to_fp16() -> None:
    model = network("x = HardSwish(a)")
    half = to_reduced(equalize(model, maxima_of(model, "x"), {"x": 1.0}), "fp16")
    expected = run_batches(model, [IMAGES])
    found = run_batches(with_roundings(half), [IMAGES])
    np.testing.assert_allclose(found, expected, atol=1e-2 * np.abs(expected).max())


def test_activations_with_other_readers_are_not_scaled() -> None:
    body = """a = Conv(input, w1) x = Relu(a) c = Conv(x, w2) d = Conv(c, w3) s = Add(d, x)
        p = GlobalAveragePool(s) f = Flatten(p) logits = Gemm(f, w4)"""
    weights = {"w1": RANDOM.normal(size=(6, 3, 1, 1)), "w2": RANDOM.normal(size=(5, 6, 1, 1))}
    model = graph(body, w3=RANDOM.normal(size=(6, 5, 1, 1)), w4=RANDOM.normal(size=(6, 4)), **weights)
    assert equalizable_tensors(model, ["x", "c", "f"]) == ["c"]
