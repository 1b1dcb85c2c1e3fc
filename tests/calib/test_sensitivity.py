import dataclasses
import itertools

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calib.config import CalibrationConfig
from calib.placement import points_of
from calib.ptq import Calibrated, calibrate
from calib.quantize import quantize
from calib.sensitivity import HeldOut, expected_loss, measure_sensitivity, meet_budget
from runtime.graph.model import run_batches
from tests.support.networks import graph


def images(channels: np.ndarray | float = 1.0) -> np.ndarray:
    random = np.random.default_rng(1)
    pixels = random.normal(size=(40, 3, 8, 8)) + random.normal(size=(40, 3, 1, 1))
    return (pixels * np.reshape(channels, (-1, 1, 1))).astype(np.float32)


def scales(spread: float, channels: int) -> np.ndarray:
    return np.geomspace(1, spread, channels)


def network(inputs: float = 1.0, first: float = 1.0, second: float = 1.0) -> onnx.ModelProto:
    """Build three convolutions. Each argument is the spread of the channel ranges that one of them reads.

    The weights compensate for the spread, so the float network does not depend on it, but INT8 loses the small
    channels.
    """
    random = np.random.default_rng(0)
    body = """a = Conv <pads = [1, 1, 1, 1]> (input, w1) r = Relu(a) b = Conv(r, w2) s = Relu(b)
        c = Conv(s, w3) p = GlobalAveragePool(c) logits = Flatten(p)"""
    factors = [scales(*pair) for pair in ((inputs, 3), (first, 6), (second, 8))]
    weights = [random.normal(size=shape) for shape in ((6, 3, 3, 3), (8, 6, 1, 1), (4, 8, 1, 1))]
    for weight, read in zip(weights, factors, strict=True):
        weight /= read[None, :, None, None]
    for weight, written in zip(weights, factors[1:], strict=False):
        weight *= written[:, None, None, None]
    return graph(body, w1=weights[0], w2=weights[1], w3=weights[2])


def calibrated(model: onnx.ModelProto, pixels: np.ndarray, budget: float) -> Calibrated:
    config = CalibrationConfig(method="minmax", correct_bias=False, budget=budget)
    return calibrate(model, lambda count: iter([pixels]), config, held={"clean": lambda: iter([pixels])})


def test_a_changed_class_costs_the_difference_of_its_probabilities() -> None:
    reference = np.log(np.asarray([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1]]))
    assert expected_loss(reference, reference) == 0.0
    assert expected_loss(reference, np.asarray([[0.0, 1.0, 0.0], [9.0, 1.0, 0.0]])) == pytest.approx(0.15)
    assert expected_loss(reference + 100, np.asarray([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])) == pytest.approx(0.3)


def test_sensitivity_is_the_kl_divergence_in_nats() -> None:
    """0.5 log(0.5 / 0.25) + 0.5 log(0.5 / 0.75) = 0.1438"""
    impossible = [0, 0, -80, -80]
    body = "p = GlobalAveragePool(input) f = Flatten(p) logits = Gemm(f, w, b)"
    quantized = graph(body, w=np.eye(3, 4), b=np.asarray(impossible))
    image = np.log(np.asarray([0.25, 0.75, 1.0], np.float32)).reshape(1, 3, 1, 1) * np.ones((1, 3, 8, 8), np.float32)
    reference = np.asarray([impossible], np.float32)  # the probabilities are 0.5, 0.5, 0, 0
    (point,) = points_of(quantized)
    found = measure_sensitivity(lambda points: quantized, [point], [image], [reference])
    assert found == {"Gemm_2": pytest.approx(0.1438, abs=1e-4)}


def test_only_the_layer_that_loses_accuracy_is_kept_in_floating_point() -> None:
    model = network(first=1e4)
    whole = calibrated(model, images(), budget=100)
    assert whole.fallback is not None
    assert whole.int8_share == 1.0
    assert [trial.floating for trial in whole.fallback.trials] == [()]
    assert whole.fallback.sensitivity == {}
    loss = whole.fallback.chosen.loss
    assert loss > 0.01

    kept = calibrated(model, images(), budget=50 * loss)
    assert kept.fallback is not None
    assert kept.fallback.met
    assert kept.fallback.chosen.floating == ("Conv_2",)
    assert max(kept.fallback.sensitivity, key=kept.fallback.sensitivity.__getitem__) == "Conv_2"
    assert kept.fallback.chosen.loss <= loss / 2
    assert [point.int8 for point in kept.points] == [True, False, True]
    assert "kept in floating point for the budget: in INT8 alone it changes the output by" in kept.points[1].reason
    assert 0.5 < kept.int8_share < 1.0
    quantized = [node for node in kept.model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantized) == 2


def test_an_unreachable_budget_results_in_the_smallest_loss_of_all_choices() -> None:
    model, pixels = network(1e4, 1e4, 1e4), images(scales(1e4, 3))
    found = calibrated(model, pixels, budget=0)
    assert found.fallback is not None
    assert not found.fallback.met
    assert found.int8_share > 0  # one layer stays in INT8, whatever it costs
    reference = run_batches(model, [pixels])
    losses = {}
    nodes = [point.node for point in found.points]
    for floating in itertools.chain.from_iterable(itertools.combinations(nodes, count) for count in range(len(nodes))):
        points = [dataclasses.replace(point, int8=point.node not in floating) for point in found.points]
        logits = run_batches(quantize(model, points, found.thresholds), [pixels])
        losses[floating] = expected_loss(reference, logits)
    assert min(losses.values()) > 0.01
    assert found.fallback.chosen.loss == pytest.approx(min(losses.values()))
    assert losses[()] > 10 * found.fallback.chosen.loss


def test_probabilities_cost_what_their_logits_cost() -> None:
    """Taken for logits, probabilities would all be similar, and every loss would be small."""
    plain = network(second=3000.0)
    body = """a = Conv <pads = [1, 1, 1, 1]> (input, w1) r = Relu(a) b = Conv(r, w2) s = Relu(b)
        c = Conv(s, w3) p = GlobalAveragePool(c) f = Flatten(p) logits = Softmax <axis = 1> (f)"""
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in plain.graph.initializer}
    pixels = images()
    found = [calibrated(model, pixels, 0.0001).fallback for model in (plain, graph(body, **weights))]
    assert found[0] is not None and found[1] is not None
    assert found[0].trials[0].loss > 0
    assert found[1].trials[0].loss == pytest.approx(found[0].trials[0].loss, rel=1e-3)
    assert found[1].sensitivity == pytest.approx(found[0].sensitivity, rel=1e-2, abs=1e-6)


def test_layers_of_unknown_size_stay_in_int8_if_the_budget_allows_it() -> None:
    """All choices then have the same share of multiply-accumulates."""
    model, pixels = network(second=3000.0), images()
    points = [dataclasses.replace(point, macs=0) for point in points_of(model)]
    thresholds = calibrated(model, pixels, 100.0).thresholds
    known = meet_budget(model, lambda some: quantize(model, some, thresholds), points_of(model), 0.02, held(pixels))
    found = meet_budget(model, lambda some: quantize(model, some, thresholds), points, 0.02, held(pixels))
    assert found.met
    within = [len(trial.floating) for trial in found.trials if trial.loss <= found.budget]
    assert len(found.chosen.floating) == min(within) <= len(known.chosen.floating)


def held(pixels: np.ndarray) -> HeldOut:
    return {"clean": lambda: iter([pixels])}
