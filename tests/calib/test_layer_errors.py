import numpy as np
import onnx
import pytest

from calib.layer_errors import layer_errors
from calib.placement import points_of
from calib.quantize import quantize
from runtime.graph.compare import tensor_values
from tests.support.networks import classifier

IMAGES = np.random.default_rng(1).normal(size=(6, 3, 8, 8)).astype(np.float32)


def convolution(model: onnx.ModelProto) -> np.ndarray:
    """Return the output of the network's convolution, (6, 4, 6, 6)."""
    name = next(node.output[0] for node in model.graph.node if node.op_type == "Conv")
    return tensor_values(model, [name], IMAGES)[name].astype(np.float64)


def test_errors_are_those_of_the_quantized_layer_alone() -> None:
    model = classifier()
    points = points_of(model)
    seen: list[int] = []
    found = layer_errors(model, points, {"input": [0.5, 4.0, 4.0]}, [IMAGES[:2], IMAGES[2:]], seen.append)
    assert seen == [2, 4]
    assert [(entry.node, entry.tensor, entry.threshold) for entry in found] == [
        *(("Conv_0", "input", 0.5), ("Conv_0", "input", 4.0)),
    ]
    exact = convolution(model)
    for entry in found:
        error = convolution(quantize(model, points, {"input": entry.threshold})) - exact
        assert entry.noise == pytest.approx((error**2).sum() / (exact**2).sum(), rel=1e-3)
        assert entry.shift == pytest.approx(error.mean((0, 2, 3)), rel=1e-3, abs=1e-5)
    assert found[0].noise > found[1].noise


def test_a_corrected_bias_removes_the_mean_error_of_each_channel() -> None:
    model = classifier()
    points = points_of(model)
    (entry,) = layer_errors(model, points, {"input": [0.5]}, [IMAGES])
    assert np.abs(entry.shift).max() > 1e-3
    corrected = quantize(model, points, {"input": 0.5}, biases={entry.node: -entry.shift})
    error = convolution(corrected) - convolution(model)
    assert np.abs(error.mean((0, 2, 3))).max() < 1e-5
