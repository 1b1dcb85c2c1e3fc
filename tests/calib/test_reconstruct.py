import numpy as np
import onnx

from calib.placement import points_of
from calib.quantize import quantize, quantize_weight
from calib.reconstruct import reconstruct
from runtime.graph.edit import along
from runtime.graph.model import run_batches
from tests.support.networks import graph


def network() -> onnx.ModelProto:
    """Build a dense, a strided depthwise (padded on one side) and a pointwise convolution, and a Gemm."""
    random = np.random.default_rng(0)
    body = """a = Conv <pads = [1, 1, 1, 1]> (input, w1, b1) r = Relu(a)
        d = Conv <pads = [0, 0, 1, 1], strides = [2, 2], group = 8> (r, w2) e = Relu(d)
        c = Conv(e, w3) p = GlobalAveragePool(c) f = Flatten(p) logits = Gemm <transB = 1> (f, w4, b4)"""
    return graph(
        body,
        w1=random.normal(size=(8, 3, 3, 3)),
        b1=random.normal(size=8),
        w2=random.normal(size=(8, 1, 3, 3)),
        w3=random.normal(size=(12, 8, 1, 1)),
        w4=random.normal(size=(4, 12)),
        b4=random.normal(size=4),
    )


def flat_images(seed: int) -> np.ndarray:
    """Return images of almost one color each: rounding errors within a filter can cancel. Values are whole numbers."""
    random = np.random.default_rng(seed)
    colors = random.uniform(-100, 100, size=(32, 3, 1, 1))
    return np.round(colors + random.normal(size=(32, 3, 8, 8))).astype(np.float32)


def test_learned_rounding_lets_errors_cancel() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 3, 5, 5))
    model = graph("c = Conv(input, w) p = GlobalAveragePool(c) logits = Flatten(p)", w=weight)
    points = points_of(model)
    weights, biases = reconstruct(model, points, {"input": 127.0}, [flat_images(1)], steps=150)
    expected = run_batches(model, [flat_images(2)])
    errors = {}
    for name, rounded in (("nearest", {}), ("learned", weights)):
        quantized = quantize(model, points, {"input": 127.0}, weights=rounded)
        errors[name] = np.square(run_batches(quantized, [flat_images(2)]) - expected).mean()
    assert errors["learned"] < 0.2 * errors["nearest"]
    assert np.abs(biases["Conv_0"]).max() < 1
    assert list(weights) == ["Conv_0"]


def test_weights_of_every_kind_of_layer_are_rounded_up_or_down_reproducibly() -> None:
    model = network()
    points = points_of(model)
    images = np.random.default_rng(1).normal(size=(8, 3, 8, 8)).astype(np.float32)
    thresholds = {point.tensor: 10.0 for point in points}
    done: list[int] = []
    weights, _ = reconstruct(model, points, thresholds, [images], steps=20, progress=done.append)
    again, _ = reconstruct(model, points, thresholds, [images], steps=20)
    assert len(weights) == sum(done) == 4
    for point in points:
        weight = next(onnx.numpy_helper.to_array(item) for item in model.graph.initializer if item.name == point.weight)
        _, scales = quantize_weight(weight, point.axis)
        ratio = weight / along(scales, point.axis, weight.ndim)
        assert (np.abs(weights[point.node] - ratio) < 1 + 1e-4).all()
        np.testing.assert_array_equal(weights[point.node], again[point.node])


def test_layers_with_shared_weights_or_in_floating_point_are_skipped() -> None:
    body = """a = Conv <pads = [1, 1, 1, 1]> (input, w1) b = Conv <pads = [1, 1, 1, 1]> (a, w1) c = Conv(b, w2)
        p = GlobalAveragePool(c) logits = Flatten(p)"""
    random = np.random.default_rng(0)
    model = graph(body, w1=random.normal(size=(3, 3, 3, 3)), w2=random.normal(size=(4, 3, 1, 1)))
    points = points_of(model, keep=["Conv_2"])
    images = random.normal(size=(8, 3, 8, 8)).astype(np.float32)
    assert reconstruct(model, points, {"input": 3.0, "a": 30.0}, [images]) == ({}, {})
