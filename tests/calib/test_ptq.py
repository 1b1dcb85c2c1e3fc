from collections.abc import Callable, Iterator

import numpy as np
import onnx
import pytest

from calib.config import CalibrationConfig
from calib.ptq import calibrate
from runtime.errors import ConfigError, DataError
from runtime.graph.model import run_batches
from tests.support.networks import classifier, graph


def normal(count: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, 3, 8, 8)).astype(np.float32)


def batches(images: np.ndarray) -> Callable[[int], Iterator[np.ndarray]]:
    return lambda count: iter([images[: count or None]])


def test_few_images_cause_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert calibrate(classifier(), batches(normal(6))).int8_share == 1.0
    assert "found only 6 calibration images; use at least 32 (recommended: 256)" in caplog.text


def test_images_of_zeros_or_nan_are_refused() -> None:
    with pytest.raises(DataError, match="every tensor is zero"):
        calibrate(classifier(), batches(np.zeros((6, 3, 8, 8), np.float32)))
    images = normal(6)
    images[0, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="the tensor input has values that are not finite"):
        calibrate(classifier(), batches(images))


def test_an_unknown_node_to_keep_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no convolution or matrix product is called 'Conv_1'; did you mean Conv_0"):
        calibrate(classifier(), batches(normal(6)), CalibrationConfig(keep=("Conv_1",)))


def test_a_layer_whose_input_is_always_zero_stays_in_floating_point() -> None:
    """The first bias is so low that the ReLU passes nothing."""
    body = """a = Conv(input, w1, low) r = Relu(a) b = Conv(r, w2) p = GlobalAveragePool(b) logits = Flatten(p)"""
    random = np.random.default_rng(0)
    weights = {"w1": random.normal(size=(5, 3, 3, 3)), "w2": random.normal(size=(4, 5, 1, 1))}
    points = calibrate(graph(body, low=np.full(5, -1000.0), **weights), batches(normal(4))).points
    assert [(point.node, point.int8) for point in points] == [("Conv_0", True), ("Conv_2", False)]
    assert "zero on every calibration image" in points[1].reason


def outlier_network() -> onnx.ModelProto:
    """A depthwise layer whose input has one channel that is 2,000 times larger than the others."""
    body = """x = Conv(input, w0) d = Conv<group: int = 4>(x, w1) p = GlobalAveragePool(d) f = Flatten(p)
        logits = Gemm(f, w2)"""
    random = np.random.default_rng(0)
    w0 = random.normal(size=(4, 3, 1, 1)) * np.array([1, 1, 1, 2000]).reshape(4, 1, 1, 1)
    w1 = random.normal(size=(4, 1, 1, 1)) * np.array([1, 1, 1, 1e-4]).reshape(4, 1, 1, 1)
    return graph(body, w0=w0, w1=w1, w2=random.normal(size=(4, 4)))


@pytest.mark.parametrize(("max_noise", "quantized"), [(1.0, False), (100.0, True)])
def test_a_layer_that_int8_cannot_represent_stays_in_floating_point(max_noise: float, quantized: bool) -> None:
    """INT8 rounds the three small channels to zero, and the layer's weights reduce the large one."""
    found = calibrate(outlier_network(), batches(normal(40)), CalibrationConfig(max_noise=max_noise))
    points = {point.node: point for point in found.points}
    assert points["Conv_1"].int8 == quantized
    assert points["Conv_0"].int8 and points["Gemm_4"].int8
    assert quantized or points["Conv_1"].reason.endswith("% of its output (limit 1 %)")


def test_matrix_products_are_quantized_per_output_channel() -> None:
    body = """f = Flatten(input) m = MatMul(f, w1) r = Relu(m) logits = Gemm(r, w2, b)"""
    random = np.random.default_rng(0)
    w1 = random.normal(size=(192, 6)) * np.geomspace(1, 100, 6)
    model = graph(body, w1=w1, w2=random.normal(size=(6, 4)), b=random.normal(size=4))
    images = normal(40)
    calibrated = calibrate(model, batches(images))
    assert [(point.op, point.axis, point.int8) for point in calibrated.points] == [
        ("MatMul", 1, True),
        ("Gemm", 1, True),
    ]
    exact, found = (run_batches(each, [images]) for each in (model, calibrated.model))
    assert np.abs(found - exact).max() < 0.02 * np.abs(exact).max()


def residual() -> onnx.ModelProto:
    random = np.random.default_rng(0)
    body = """x = Conv(input, w0) a = Conv(x, w1) r = Relu(a) b = Conv(r, w2) s = Add(b, x)
        p = GlobalAveragePool(s) logits = Flatten(p)"""
    shapes = {"w0": (4, 3, 1, 1), "w1": (6, 4, 1, 1), "w2": (4, 6, 1, 1)}
    return graph(body, **{name: random.normal(size=shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("residuals", [False, True])
def test_the_identity_of_a_residual_add_is_quantized_on_request(residuals: bool) -> None:
    found = calibrate(residual(), batches(normal(40)), CalibrationConfig(residuals=residuals))
    add = next(node for node in found.model.graph.node if node.op_type == "Add")
    assert list(add.input) == ["b", "x_dequantized" if residuals else "x"]


def test_a_residual_that_no_int8_layer_reads_gets_a_threshold_too() -> None:
    config = CalibrationConfig(residuals=True, keep=("Conv_1",))
    found = calibrate(residual(), batches(normal(40)), config)
    assert 0 < found.thresholds["x"] <= found.histograms["x"].amax


@pytest.mark.parametrize("method", ["auto", "minmax", "percentile", "entropy", "mse"])
def test_bias_correction_removes_the_mean_error_of_a_single_layer(method: str) -> None:
    images = normal(40)
    errors = {}
    for correct in (False, True):
        config = CalibrationConfig(method=method, correct_bias=correct)
        model = graph("c = Conv(input, w) p = GlobalAveragePool(c) logits = Flatten(p)", w=normal(4)[:, :, :3, :3])
        found = calibrate(model, batches(images), config).model
        errors[correct] = np.abs((run_batches(found, [images]) - run_batches(model, [images])).mean(0)).max()
    assert errors[True] < 1e-5 < errors[False]


def test_progress_counts_images_and_layers() -> None:
    seen: dict[str, int] = {}
    calibrate(classifier(), batches(normal(40)), progress=seen.__setitem__)
    assert seen == {"ranges": 40, "layers": 40}
