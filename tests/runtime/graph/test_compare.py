import numpy as np
import onnx
from onnx import numpy_helper

from calib.precision import to_reduced
from runtime.graph.compare import first_beyond, graph_errors
from runtime.graph.rounding import rounded_name, with_roundings
from tests.support.networks import graph, scale_weight

IMAGES = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)


def network() -> onnx.ModelProto:
    random = np.random.default_rng(0)
    body = """a = Conv(input, w1) r = Relu(a) b = Conv(r, w2) s = Sigmoid(b)
        p = GlobalAveragePool(s) logits = Flatten(p)"""
    return graph(body, 32, 32, w1=random.normal(size=(8, 3, 3, 3)), w2=random.normal(size=(4, 8, 1, 1)))


def test_equal_graphs_do_not_diverge() -> None:
    errors = graph_errors(network(), network(), IMAGES)
    assert [entry.tensor for entry in errors] == ["a", "r", "b", "s", "p", "logits"]
    assert {(entry.error, entry.added) for entry in errors} == {(0.0, 0.0)}


def test_the_first_node_that_diverges_is_named_and_adds_most() -> None:
    faulty = network()
    scale_weight(faulty, "w2")
    errors = graph_errors(network(), faulty, IMAGES)
    first = first_beyond(errors, 1e-4)
    assert first is not None
    assert (first.node, first.tensor) == ("Conv_2", "b")
    assert max(errors, key=lambda entry: entry.added) == first


def test_nan_and_overflow_count_as_divergence() -> None:
    large = network()
    tensor = next(tensor for tensor in large.graph.initializer if tensor.name == "w1")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1e4), "w1"))
    rounded = with_roundings(to_reduced(large, "fp16"))
    first = first_beyond(graph_errors(large, rounded, IMAGES, rounded_name), 2e-2)
    assert first is not None
    assert (first.tensor, first.error) == ("r", float("inf"))
    assert first.op == "Relu"
