import numpy as np
import onnx

from calib.precision import to_reduced
from runtime.graph.compare import added_error, first_above, graph_errors, relative_error
from runtime.graph.rounding import rounded_name, with_roundings
from tests.support.networks import graph, scale_initializer

IMAGES = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)


def network() -> onnx.ModelProto:
    random = np.random.default_rng(0)
    body = """a = Conv(input, w1) r = Relu(a) b = Conv(r, w2) s = Sigmoid(b)
        p = GlobalAveragePool(s) logits = Flatten(p)"""
    return graph(body, 32, 32, w1=random.normal(size=(8, 3, 3, 3)), w2=random.normal(size=(4, 8, 1, 1)))


def test_equal_graphs_have_no_error() -> None:
    errors = graph_errors(network(), network(), IMAGES)
    assert [entry.tensor for entry in errors] == ["a", "r", "b", "s", "p", "logits"]
    assert {(entry.error, entry.added) for entry in errors} == {(0.0, 0.0)}


def test_the_node_with_a_wrong_weight_is_the_first_above_the_tolerance_and_adds_the_largest_error() -> None:
    faulty = network()
    scale_initializer(faulty, "w2", 1.1)
    errors = graph_errors(network(), faulty, IMAGES)
    first = first_above(errors, 1e-4)
    assert first is not None
    assert (first.node, first.tensor) == ("Conv_2", "b")
    assert max(errors, key=lambda entry: entry.added) == first


def test_the_error_of_an_overflow_is_inf() -> None:
    large = network()
    scale_initializer(large, "w1", 1e4)
    rounded = with_roundings(to_reduced(large, "fp16"))
    first = first_above(graph_errors(large, rounded, IMAGES, rounded_name), 2e-2)
    assert first is not None
    assert (first.op, first.tensor, first.error) == ("Relu", "r", float("inf"))


def test_relative_errors_by_hand() -> None:
    expected = np.asarray([1.0, -4.0], np.float32)
    assert relative_error(expected, np.asarray([1.5, -4.0], np.float32)) == 0.125
    assert relative_error(expected, np.asarray([1.0, np.nan], np.float32)) == float("inf")
    assert relative_error(expected, np.zeros(3, np.float32)) == float("inf")
    assert relative_error(np.zeros(2, np.float32), np.asarray([0.0, 0.25], np.float32)) == 0.25
    assert relative_error(np.zeros(0, np.float32), np.zeros(0, np.float32)) == 0.0
    assert (added_error(0.5, 0.125), added_error(0.125, 0.5), added_error(float("inf"), float("inf"))) == (0.375, 0, 0)
