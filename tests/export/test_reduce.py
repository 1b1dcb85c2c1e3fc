from collections.abc import Iterator

import numpy as np
import onnx

from calib.precision import deciding_tensors
from export.reduce import Reduced, reduce_precision
from export.verify import TOLERANCE, agrees, compare
from runtime.graph.collect import collect
from runtime.graph.model import run_batches
from runtime.graph.rounding import with_roundings
from tests.support.networks import classifier, graph


def batches() -> Iterator[np.ndarray]:
    images = np.random.default_rng(1).normal(size=(8, 3, 8, 8)).astype(np.float32)
    yield from (images[:4], images[4:])


def run(model: onnx.ModelProto) -> np.ndarray:
    return run_batches(model, batches())


def reduce(model: onnx.ModelProto, precision: str) -> Reduced:
    amax, logits = collect(model, batches(), tensors=deciding_tensors(model))
    return reduce_precision(model, precision, amax=amax, logits_NK=logits, batches=batches, run=run)


def small_difference_of_large_numbers() -> onnx.ModelProto:
    """Add 20,000 to the features and subtract it again: FP16 has steps of 16 in that range."""
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)) * np.asarray([1, 2, 3, 4]).reshape(4, 1, 1, 1)
    body = """a = Conv(input, w) r = Relu(a) b = Add(r, large) c = Sub(b, large)
        p = GlobalAveragePool(c) logits = Flatten(p)"""
    return graph(body, w=weight, large=np.full((1, 4, 1, 1), 20000.0))


def test_an_ordinary_network_is_converted_completely() -> None:
    for precision in ("fp16", "bf16"):
        reduced = reduce(classifier(), precision)
        assert reduced.decisions == ()
        assert agrees(reduced.parity, TOLERANCE[precision])


def test_nodes_that_overflow_stay_in_fp32() -> None:
    body = "a = Conv(input, w) r = Relu(a) b = Mul(r, small) p = GlobalAveragePool(b) logits = Flatten(p)"
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)) * 1e4
    reduced = reduce(graph(body, w=weight, small=np.asarray(1e-4)), "fp16")
    assert agrees(reduced.parity, TOLERANCE["fp16"])
    assert {decision.reason for decision in reduced.decisions} == {"overflow"}
    assert [decision.op for decision in reduced.decisions] == ["Conv", "Relu", "Mul"]


def test_nodes_that_lose_too_much_accuracy_stay_in_fp32() -> None:
    model = small_difference_of_large_numbers()
    reduced = reduce(model, "fp16")
    assert agrees(reduced.parity, TOLERANCE["fp16"]), reduced.parity
    kept = {decision.op: decision for decision in reduced.decisions}
    assert {"Add", "Sub"} <= set(kept)
    assert {decision.reason for decision in reduced.decisions} == {"loss"}
    assert kept["Sub"].tensor == "c"
    assert kept["Sub"].error > TOLERANCE["fp16"]
    assert compare(run(model), run(reduced.rounded)) == reduced.parity
    np.testing.assert_array_equal(run(with_roundings(reduced.model)), run(reduced.rounded))
