import warnings

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import TopologicalSortPass
from onnxruntime.transformers.float16 import convert_float_to_float16

from calib.precision import LIMIT, Decision, deciding_tensors, overflows, to_reduced
from runtime.graph.collect import collect_amax
from runtime.graph.rounding import with_roundings
from tests.support.networks import graph


def network(gain: float) -> onnx.ModelProto:
    """Two convolutions; the first is scaled by `gain`, the second by its inverse."""
    text = """<ir_version: 9, opset_import: ["" : 20]>
    g (float[n, 3, 8, 8] input) => (float[n, 5] logits) {
        a = Conv(input, w1) r = Relu(a) b = Conv(r, w2) p = GlobalAveragePool(b) logits = Flatten(p)
    }"""
    model = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    weights = {"w1": random.normal(size=(4, 3, 3, 3)) * gain, "w2": random.normal(size=(5, 4, 1, 1)) / gain}
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    return onnx.shape_inference.infer_shapes(model)


def images() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(4, 3, 8, 8)).astype(np.float32)


def run(model: onnx.ModelProto) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"input": images()})[0]


def to_fp16(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[Decision]]:
    decisions = overflows(model, collect_amax(model, [images()]))
    return to_reduced(model, "fp16", decisions), decisions


def rounded(model: onnx.ModelProto) -> np.ndarray:
    return run(with_roundings(model))


def plainly_converted(model: onnx.ModelProto) -> onnx.ModelProto:
    """What ONNX Runtime's converter makes without ranges."""
    graph = ir.from_proto(convert_float_to_float16(model, keep_io_types=True))
    TopologicalSortPass()(graph)
    return ir.to_proto(graph)


def test_an_ordinary_network_is_fp16_throughout_with_float32_input_and_output() -> None:
    model = network(1.0)
    half, decisions = to_fp16(model)
    assert decisions == []
    assert {tensor.data_type for tensor in half.graph.initializer} == {TensorProto.FLOAT16}
    assert [node.op_type for node in half.graph.node].count("Cast") == 2
    assert half.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert half.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    np.testing.assert_allclose(rounded(half), run(model), rtol=1e-2, atol=1e-2)


def test_a_planted_overflow_stays_in_fp32_and_is_named() -> None:
    model = network(1e5)
    with np.errstate(all="ignore"):
        assert not np.isfinite(rounded(plainly_converted(network(1e5)))).all()
    half, decisions = to_fp16(model)
    np.testing.assert_allclose(rounded(half), run(model), rtol=1e-2, atol=1e-2)
    assert [decision.op for decision in decisions] == ["Conv", "Relu", "Conv"]
    assert all(decision.amax > LIMIT for decision in decisions)


def test_casts_stand_only_where_types_change() -> None:
    model = network(1e5)
    half, _ = to_fp16(model)
    assert [node.op_type for node in half.graph.node] == [
        *("Conv", "Relu", "Conv", "Cast", "GlobalAveragePool", "Flatten", "Cast"),
    ]


def test_a_weight_beyond_fp16_keeps_its_node_in_fp32() -> None:
    model = network(1.0)
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[0] *= 1e6 / np.abs(weight[0]).max()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w1"))
    _, decisions = to_fp16(model)
    assert decisions[0].tensor in ("w1", "a")


@pytest.mark.parametrize("gain", [1.0, 1e5])
def test_roundings_are_those_of_the_onnx_reference(gain: float) -> None:
    half = plainly_converted(network(gain))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy says that it overflows
        expected = ReferenceEvaluator(half).run(None, {"input": images()})[0]
    assert np.array_equal(rounded(half), expected, equal_nan=True) or gain == 1e5
    assert np.isfinite(rounded(half)).all() == np.isfinite(expected).all()


@pytest.mark.parametrize("gain", [1.0, 1e5])
def test_the_deciding_tensors_tell_whether_any_overflows(gain: float) -> None:
    model = network(gain)
    wanted = deciding_tensors(model)
    assert wanted == {"input", "r", "b"}  # `a` only through the Relu, `p` and `logits` reach no further than `b`
    some = overflows(model, collect_amax(model, [images()], tensors=wanted))
    assert bool(some) == bool(to_fp16(model)[1]) == (gain > 1)


def test_what_overflows_below_zero_behind_a_relu_is_zero_all_the_same() -> None:
    model = network(1.0)
    first = next(tensor for tensor in model.graph.initializer if tensor.name == "w1")
    images_positive = np.abs(images())
    first.CopyFrom(numpy_helper.from_array(-np.abs(numpy_helper.to_array(first)) * 2e4, "w1"))
    amax = collect_amax(model, [images_positive], tensors=deciding_tensors(model))
    assert overflows(model, amax) == [decision for decision in overflows(model, amax) if decision.tensor == "w1"]
    half = to_reduced(model, "fp16")
    session = ort.InferenceSession(with_roundings(half).SerializeToString(), providers=["CPUExecutionProvider"])
    assert not session.run(None, {"input": images_positive})[0].any()


def test_bf16_holds_what_fp16_does_not() -> None:
    model = network(1e5)
    wide = to_reduced(model, "bf16")
    onnx.checker.check_model(wide, full_check=True)
    assert {tensor.data_type for tensor in wide.graph.initializer} == {TensorProto.BFLOAT16}
    expected = run(model)
    np.testing.assert_allclose(rounded(wide), expected, atol=0.03 * np.abs(expected).max())


def test_bf16_tensors_are_rounded_to_eight_bits() -> None:
    probe = with_roundings(to_reduced(network(1.0), "bf16"))
    probe.graph.output.append(onnx.helper.make_tensor_value_info("r/rounded", TensorProto.FLOAT, None))
    session = ort.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    (values,) = session.run(["r/rounded"], {"input": images()})
    assert values.any()
    assert not (values.view(np.uint32) & 0xFFFF).any()


def test_orderly_operators_pass_roundings_on_to_the_same_bits() -> None:
    body = """a = Conv(input, w) m = MaxPool<kernel_shapes=[2, 2], kernel_shape=[2, 2]>(a)
        c = Clip(m, low, high) t = Transpose<perm=[0, 1, 3, 2]>(c) r = Relu(t)
        p = GlobalAveragePool(r) logits = Flatten(p)""".replace("kernel_shapes=[2, 2], ", "")
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3))
    half = to_reduced(graph(body, w=weight, low=np.float32(-0.3), high=np.float32(2.7)), "fp16")
    roundings = [node.op_type for node in with_roundings(half).graph.node].count("Cast")
    assert roundings == 2 * 3 + 2  # input, clipped, pooled; flattened and the ends' own casts
    assert np.array_equal(rounded(half), ReferenceEvaluator(half).run(None, {"input": images()})[0])
