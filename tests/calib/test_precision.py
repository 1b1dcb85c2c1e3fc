import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import TopologicalSortPass
from onnxruntime.transformers.float16 import convert_float_to_float16

from calib.precision import LIMIT, Decision, deciding_tensors, overflows, to_reduced
from runtime.graph.collect import collect_amax
from runtime.graph.model import run_batches
from runtime.graph.rounding import with_roundings
from tests.support.networks import graph, scale_initializer

IMAGES = np.random.default_rng(1).normal(size=(4, 3, 8, 8)).astype(np.float32)


def network(gain: float = 1.0) -> onnx.ModelProto:
    """Two convolutions; the first is scaled by `gain`, the second by its inverse."""
    random = np.random.default_rng(0)
    body = "a = Conv(input, w1) r = Relu(a) b = Conv(r, w2) p = GlobalAveragePool(b) logits = Flatten(p)"
    return graph(body, w1=random.normal(size=(4, 3, 3, 3)) * gain, w2=random.normal(size=(4, 4, 1, 1)) / gain)


def run(model: onnx.ModelProto) -> np.ndarray:
    return run_batches(model, [IMAGES])


def rounded(model: onnx.ModelProto) -> np.ndarray:
    return run(with_roundings(model))


def to_fp16(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[Decision]]:
    decisions = overflows(model, collect_amax(model, [IMAGES]))
    return to_reduced(model, "fp16", decisions), decisions


def onnxruntime_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert with ONNX Runtime's own converter, which does not know the ranges."""
    converted = ir.from_proto(convert_float_to_float16(model, keep_io_types=True))
    TopologicalSortPass()(converted)
    return ir.to_proto(converted)


def test_an_ordinary_network_becomes_all_fp16_with_float32_input_and_output() -> None:
    model = network()
    half, decisions = to_fp16(model)
    assert decisions == []
    assert {tensor.data_type for tensor in half.graph.initializer} == {TensorProto.FLOAT16}
    assert [node.op_type for node in half.graph.node].count("Cast") == 2
    assert half.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert half.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    np.testing.assert_allclose(rounded(half), run(model), rtol=1e-2, atol=1e-2)


def test_nodes_that_overflow_stay_in_fp32_and_are_named() -> None:
    model = network(1e5)
    with np.errstate(all="ignore"):
        assert not np.isfinite(rounded(onnxruntime_fp16(network(1e5)))).all()
    half, decisions = to_fp16(model)
    np.testing.assert_allclose(rounded(half), run(model), rtol=1e-2, atol=1e-2)
    assert [decision.op for decision in decisions] == ["Conv", "Relu", "Conv"]
    assert all(decision.amax > LIMIT for decision in decisions)


def test_casts_are_inserted_only_where_the_type_changes() -> None:
    half, _ = to_fp16(network(1e5))
    assert [node.op_type for node in half.graph.node] == [
        *("Conv", "Relu", "Conv", "Cast", "GlobalAveragePool", "Flatten", "Cast"),
    ]


def test_a_node_with_a_weight_beyond_fp16_stays_in_fp32() -> None:
    model = network()
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[0] *= 1e6 / np.abs(weight[0]).max()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w1"))
    _, decisions = to_fp16(model)
    assert (decisions[0].node, decisions[0].tensor) in {("Conv_0", "w1"), ("Conv_0", "a")}


def test_the_graph_of_onnxruntimes_converter_is_rounded_like_the_reference() -> None:
    half = onnxruntime_fp16(network())
    (expected,) = ReferenceEvaluator(half).run(None, {"input": IMAGES})
    np.testing.assert_array_equal(rounded(half), expected)


@pytest.mark.parametrize("gain", [1.0, 1e5])
def test_the_deciding_tensors_show_whether_any_tensor_overflows(gain: float) -> None:
    model = network(gain)
    deciding = deciding_tensors(model)
    assert deciding == {"input", "r", "b"}  # `a` is behind a Relu in `r`; `p` and `logits` are not larger than `b`
    some = overflows(model, collect_amax(model, [IMAGES], tensors=deciding))
    assert bool(some) == bool(to_fp16(model)[1]) == (gain > 1)


def test_negative_values_that_overflow_before_a_relu_are_zero_behind_it() -> None:
    model = network()
    first = next(tensor for tensor in model.graph.initializer if tensor.name == "w1")
    first.CopyFrom(numpy_helper.from_array(-np.abs(numpy_helper.to_array(first)) * 2e4, "w1"))
    positive = np.abs(IMAGES)
    amax = collect_amax(model, [positive], tensors=deciding_tensors(model))
    assert {decision.tensor for decision in overflows(model, amax)} <= {"w1"}
    half = to_reduced(model, "fp16")
    assert not run_batches(with_roundings(half), [positive]).any()


def test_bf16_represents_values_that_overflow_fp16() -> None:
    model = network(1e5)
    wide = to_reduced(model, "bf16")
    onnx.checker.check_model(wide, full_check=True)
    assert {tensor.data_type for tensor in wide.graph.initializer} == {TensorProto.BFLOAT16}
    expected = run(model)
    np.testing.assert_allclose(rounded(wide), expected, atol=0.03 * np.abs(expected).max())


def test_the_input_model_is_not_changed() -> None:
    model = network()
    before = model.SerializeToString(deterministic=True)
    to_reduced(model, "fp16")
    scale_initializer(to_reduced(model, "bf16"), "w1_bf16", 2.0)
    assert model.SerializeToString(deterministic=True) == before
