import numpy as np
import onnx
import pytest

from calib.equalize import equalizable, equalized
from calib.placement import points_of
from runtime.graph.collect import collect_channel_amax
from runtime.graph.model import open_session
from tests.support.networks import graph

RANDOM = np.random.default_rng(0)
SPREAD = np.geomspace(0.01, 10, 6)[:, None, None, None]
"""Output channels of very different range."""


def squeeze_and_excitation() -> onnx.ModelProto:
    """An EfficientNet block: convolution, SiLU, depthwise, SiLU, gate of the pooled, projection."""
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


def images() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(8, 3, 8, 8)).astype(np.float32)


def spread_of(model: onnx.ModelProto, tensor: str) -> float:
    maxima = collect_channel_amax(model, [images()], [tensor])[tensor]
    return float(maxima.max() / maxima[maxima > 0].min())


def test_which_activations_can_be_scaled() -> None:
    model = squeeze_and_excitation()
    tensors = [point.tensor for point in points_of(model)]
    assert equalizable(model, tensors) == ["x", "q", "z"]  # not the input, nor the pooled y, which z is made of too


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_silu_and_gates_are_equalized_bit_by_bit(alpha: float) -> None:
    model = squeeze_and_excitation()
    maxima = collect_channel_amax(model, [images()], ["x", "q", "z"])
    changed = equalized(model, maxima, dict.fromkeys(maxima, alpha))
    outputs = [open_session(graph_).run(None, {"input": images()})[0] for graph_ in (model, changed)]
    np.testing.assert_array_equal(*outputs)
    for tensor in ("x", "z"):
        assert spread_of(changed, tensor) < spread_of(model, tensor) / (1.5 if alpha < 1 else 4)
    assert {point.node for point in points_of(changed)} == {point.node for point in points_of(model)}


@pytest.mark.parametrize(
    ("activation", "fits"),
    [
        ("x = Relu(a)", True),
        ("x = HardSwish(a)", True),
        ("m = MaxPool <kernel_shape = [2, 2]> (a) x = Relu(m)", True),
        ("x = Clip(a, zero, six)", False),
        ("x = Tanh(a)", False),
        ("x = Add(a, a)", False),
    ],
)
def test_activations_that_scale(activation: str, fits: bool) -> None:
    body = f"a = Conv(input, w1, b1) {activation} c = Conv(x, w2) p = GlobalAveragePool(c) logits = Flatten(p)"
    weights = {"w1": RANDOM.normal(size=(6, 3, 3, 3)) * SPREAD, "b1": RANDOM.normal(size=6)}
    model = graph(body, w2=RANDOM.normal(size=(4, 6, 1, 1)), zero=np.zeros(()), six=np.full((), 6.0), **weights)
    assert equalizable(model, ["x"]) == (["x"] if fits else [])
    if fits:
        changed = equalized(model, collect_channel_amax(model, [images()], ["x"]), {"x": 1.0})
        outputs = [open_session(graph_).run(None, {"input": images()})[0] for graph_ in (model, changed)]
        np.testing.assert_array_equal(*outputs)
        assert spread_of(changed, "x") < spread_of(model, "x")


def test_what_others_read_is_left_alone() -> None:
    body = """a = Conv(input, w1) x = Relu(a) c = Conv(x, w2) d = Conv(c, w3) s = Add(d, x)
        p = GlobalAveragePool(s) f = Flatten(p) logits = Gemm(f, w4)"""
    weights = {"w1": RANDOM.normal(size=(6, 3, 1, 1)), "w2": RANDOM.normal(size=(5, 6, 1, 1))}
    model = graph(body, w3=RANDOM.normal(size=(6, 5, 1, 1)), w4=RANDOM.normal(size=(6, 4)), **weights)
    assert equalizable(model, ["x", "c", "f"]) == ["c"]
