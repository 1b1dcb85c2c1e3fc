from collections.abc import Iterator

import numpy as np
import onnx
import onnxruntime as ort

from calib.precision import deciding_tensors
from export.reduce import Reduced, reduce_precision
from export.verify import TOLERANCE, agrees, compare
from runtime.graph.collect import collect
from runtime.graph.rounding import with_roundings
from tests.support.networks import classifier, graph


def batches() -> Iterator[np.ndarray]:
    images = np.random.default_rng(1).normal(size=(8, 3, 8, 8)).astype(np.float32)
    yield from (images[:4], images[4:])


def run(model: onnx.ModelProto) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": batch})[0] for batch in batches()])


def reduce(model: onnx.ModelProto, precision: str) -> Reduced:
    amax, logits = collect(model, batches(), tensors=deciding_tensors(model))
    return reduce_precision(model, precision, amax=amax, logits_NK=logits, batches=batches, run=run)


def a_small_difference_of_large_numbers() -> onnx.ModelProto:
    """20,000 is added to the features and taken away again: FP16 has steps of 16 there."""
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)) * np.asarray([1, 2, 3, 4]).reshape(4, 1, 1, 1)
    body = """a = Conv(input, w) r = Relu(a) b = Add(r, large) c = Sub(b, large)
        p = GlobalAveragePool(c) logits = Flatten(p)"""
    return graph(body, w=weight, large=np.full((1, 4, 1, 1), 20000.0))


def test_an_ordinary_network_is_converted_whole() -> None:
    for precision in ("fp16", "bf16"):
        reduced = reduce(classifier(), precision)
        assert reduced.decisions == ()
        assert agrees(reduced.parity, TOLERANCE[precision])


def test_nodes_that_lose_too_much_stay_in_fp32_and_are_named() -> None:
    model = a_small_difference_of_large_numbers()
    reduced = reduce(model, "fp16")
    assert agrees(reduced.parity, TOLERANCE["fp16"]), reduced.parity
    kept = {decision.op: decision for decision in reduced.decisions}
    assert {"Add", "Sub"} <= set(kept)
    assert {decision.reason for decision in reduced.decisions} == {"loss"}
    assert kept["Sub"].tensor == "c"
    assert kept["Sub"].error > TOLERANCE["fp16"]
    assert compare(run(model), run(reduced.rounded)) == reduced.parity
    assert run(with_roundings(reduced.model)).shape == (8, 4)
