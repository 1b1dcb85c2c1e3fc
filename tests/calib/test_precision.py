import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import TopologicalSortPass
from onnxruntime.transformers.float16 import convert_float_to_float16

from calib.precision import LIMIT, Decision, ToReduced, deciding_tensors, losses, overflows, to_reduced
from runtime.graph.collect import collect_amax
from runtime.graph.compare import TensorError
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


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element type of every tensor, from ONNX's own shape inference."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    return values | {tensor.name: tensor.data_type for tensor in inferred.initializer}


def test_the_names_of_input_and_output_stay_and_casts_are_named_after_their_tensors() -> None:
    half, _ = to_fp16(network(1e5))
    assert [value.name for value in (*half.graph.input, *half.graph.output)] == ["input", "logits"]
    casts = {node.name: tuple(node.output) for node in half.graph.node if node.op_type == "Cast"}
    assert casts == {"b_fp16_cast": ("b_fp16",), "logits_cast": ("logits",)}


def test_a_product_with_a_sigmoid_is_not_measured_because_it_is_not_larger() -> None:
    body = """a = Conv(input, w) s = Sigmoid(a) gated = Mul(a, s) square = Mul(gated, gated)
              p = GlobalAveragePool(square) logits = Flatten(p)"""
    model = graph(body, w=np.ones((4, 3, 3, 3)))
    assert deciding_tensors(model) == {"input", "a", "square"}


def test_a_product_with_the_input_is_measured() -> None:
    body = """doubled = Mul(input, two) a = Conv(doubled, w) s = Sigmoid(a) gated = Mul(s, a)
              p = GlobalAveragePool(gated) logits = Flatten(p)"""
    model = graph(body, w=np.ones((4, 3, 3, 3)), two=np.float32(2))
    assert deciding_tensors(model) == {"input", "doubled", "a"}


@pytest.mark.parametrize("value", [np.nan, np.inf, 1.01 * LIMIT])
def test_values_that_fp16_cannot_represent_are_overflows(value: float) -> None:
    decisions = overflows(network(), {"r": value})
    assert [(decision.node, decision.tensor) for decision in decisions] == [("Relu_1", "r"), ("Conv_2", "r")]
    assert all(decision.amax > LIMIT for decision in decisions)


def test_values_at_the_limit_are_not_overflows() -> None:
    assert overflows(network(), {"a": LIMIT, "r": LIMIT}) == []


def test_a_large_weight_is_an_overflow_even_if_no_tensor_is_measured() -> None:
    model = network()
    scale_initializer(model, "w2", 1e6)
    amax = float(np.abs(numpy_helper.to_array(model.graph.initializer[1])).max())
    assert overflows(model, {}) == [Decision(node="Conv_2", op="Conv", reason="overflow", tensor="w2", amax=amax)]


PIECES = """up = Resize<mode="nearest">(input, roi, scales) a = Conv(up, w) part = Slice(a, starts, ends, axes)
            c = Clip(part, , six) p = GlobalAveragePool(c) logits = Reshape(p, shape)"""
"""Integer inputs, an empty one, an omitted one, and an operator without an FP16 version."""


def network_of_pieces() -> onnx.ModelProto:
    model = graph(
        PIECES,
        w=np.random.default_rng(0).normal(size=(4, 3, 3, 3)),
        roi=np.zeros(0),
        scales=np.array([1, 1, 2, 2]),
        six=np.float32(6),
    )
    integers = {"starts": [0], "ends": [np.iinfo(np.int64).max], "axes": [2], "shape": [-1, 4]}
    for name, values in integers.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    return onnx.shape_inference.infer_shapes(model)


def test_integers_and_empty_tensors_are_not_overflows() -> None:
    assert overflows(network_of_pieces(), {}) == []


def test_integers_missing_inputs_and_operators_without_fp16_are_not_converted() -> None:
    model = network_of_pieces()
    half = to_reduced(model, "fp16")
    types = types_of(half)
    assert {types[name] for name in ("starts", "ends", "axes", "shape")} == {TensorProto.INT64}
    assert {types[name] for name in ("up", "scales", "logits")} == {TensorProto.FLOAT}
    assert {types[name] for name in ("a", "part", "c", "p")} == {TensorProto.FLOAT16}
    clip = next(node for node in half.graph.node if node.op_type == "Clip")
    assert clip.input[1] == ""
    np.testing.assert_allclose(rounded(half), run(model), rtol=1e-2, atol=1e-2)


def test_quantized_tensors_stay_integers_and_their_scales_become_fp16() -> None:
    body = """q = QuantizeLinear(input, scale, zero) d = DequantizeLinear(q, scale, zero) a = Conv(d, w)
              p = GlobalAveragePool(a) logits = Flatten(p)"""
    model = graph(body, w=np.random.default_rng(0).normal(size=(4, 3, 3, 3)), scale=np.float32(1 / 32))
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), "zero"))
    half = to_reduced(onnx.shape_inference.infer_shapes(model), "fp16")
    types = types_of(half)
    assert types["q"] == TensorProto.INT8
    assert {types[name] for name in ("d", "a", "p", "scale_fp16")} == {TensorProto.FLOAT16}
    assert [node.op_type for node in half.graph.node].count("Cast") == 2


@pytest.mark.parametrize("weights", [True, False])
def test_a_second_conversion_changes_nothing(weights: bool) -> None:
    without = graph(
        "s = Sigmoid(input) f = Flatten(s) p = ReduceMean<keepdims=1>(f) logits = Concat<axis=1>(p, p, p, p)"
    )
    model = ir.from_proto(network() if weights else without)
    assert ToReduced()(model).modified
    assert not ToReduced()(model).modified


def test_the_nodes_with_the_largest_added_errors_stay_in_fp32_with_those_they_read() -> None:
    """The error that a node inherits does not count."""
    errors = [
        TensorError(node="Conv_0", op="Conv", tensor="a", error=0.1, added=0.1),
        TensorError(node="Relu_1", op="Relu", tensor="r", error=0.1, added=0.0),
        TensorError(node="Conv_2", op="Conv", tensor="b", error=0.5, added=0.4),
        TensorError(node="GlobalAveragePool_3", op="GlobalAveragePool", tensor="p", error=0.7, added=0.2),
    ]
    worst = [
        Decision(node="Conv_2", op="Conv", reason="loss", tensor="b", amax=3.0, error=0.5),
        Decision(node="Relu_1", op="Relu", reason="loss", tensor="b", amax=3.0, error=0.5),
    ]
    assert losses(network(), errors, {"b": 3.0}, 0) == []
    assert losses(network(), errors, {"b": 3.0}, 1) == worst
    second = Decision(
        node="GlobalAveragePool_3", op="GlobalAveragePool", reason="loss", tensor="p", amax=0.0, error=0.7
    )
    assert losses(network(), errors, {"b": 3.0}, 2) == [*worst, second]
