import numpy as np
import onnx
import pytest

from calib.config import CalibrationConfig
from calib.ptq import Calibrated, calibrate
from calib.sensitivity import expected_loss
from tests.support.networks import graph


def images(count: int = 40) -> np.ndarray:
    random = np.random.default_rng(1)
    return (random.normal(size=(count, 3, 8, 8)) + random.normal(size=(count, 3, 1, 1))).astype(np.float32)


def network(spread: float) -> onnx.ModelProto:
    """Three convolutions; the second reads channels whose ranges spread so far that INT8 loses the small ones."""
    random = np.random.default_rng(0)
    factors = np.geomspace(1, spread, 6)[:, None, None, None]
    body = """a = Conv <pads = [1, 1, 1, 1]> (input, w1) r = Relu(a) b = Conv(r, w2) s = Relu(b)
        c = Conv(s, w3) p = GlobalAveragePool(c) logits = Flatten(p)"""
    return graph(
        body,
        w1=random.normal(size=(6, 3, 3, 3)) * factors,
        w2=random.normal(size=(8, 6, 1, 1)) / factors.reshape(1, 6, 1, 1),
        w3=random.normal(size=(4, 8, 1, 1)),
    )


def calibrated(model: onnx.ModelProto, **wishes) -> Calibrated:
    held = {kind: lambda: iter([images()]) for kind in ("clean",)}
    config = CalibrationConfig(method="minmax", correct_bias=False, **wishes)
    return calibrate(model, lambda count: iter([images()]), config, held=held)


def test_the_loss_of_a_changed_class_is_the_difference_of_its_probabilities() -> None:
    reference = np.log(np.asarray([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1]]))
    assert expected_loss(reference, reference) == 0.0
    assert expected_loss(reference, np.asarray([[0.0, 1.0, 0.0], [9.0, 1.0, 0.0]])) == pytest.approx(0.15)
    assert expected_loss(reference + 100, np.asarray([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])) == pytest.approx(0.3)


def test_the_layer_that_loses_goes_back_and_the_others_stay() -> None:
    whole = calibrated(network(1e4), budget=100)
    assert whole.int8_share == 1.0
    assert [trial.floating for trial in whole.fallback.trials] == [()]
    assert whole.fallback.sensitivity == {}
    loss = whole.fallback.chosen.loss
    assert loss > 0.01

    kept = calibrated(network(1e4), budget=50 * loss)
    assert kept.fallback.met
    assert kept.fallback.chosen.floating == ("Conv_2",)
    assert max(kept.fallback.sensitivity, key=kept.fallback.sensitivity.__getitem__) == "Conv_2"
    assert kept.fallback.chosen.loss <= loss / 2
    assert [point.int8 for point in kept.points] == [True, False, True]
    assert "given back for the budget: alone in INT8 it changes the output by" in kept.points[1].reason
    assert 0.5 < kept.int8_share < 1.0
    quantized = [node for node in kept.model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantized) == 2


def test_a_budget_that_cannot_be_met_gives_the_best_and_says_so() -> None:
    found = calibrated(network(1e4), budget=0)
    assert found.fallback.chosen.loss == min(trial.loss for trial in found.fallback.trials)
    assert found.fallback.met == (found.fallback.chosen.loss == 0)
    assert found.int8_share > 0  # one layer stays in INT8 whatever it costs
    assert len(found.fallback.chosen.floating) < 3
