import numpy as np
import onnx_ir as ir
import pytest

from runtime.graph.edit import (
    add_initializer,
    along,
    array_of,
    constant_of,
    make_cast,
    make_node,
    replace_node,
    unused_name,
)
from runtime.graph.model import check, run_batches
from tests.support.networks import classifier


@pytest.fixture
def model() -> ir.Model:
    return ir.from_proto(classifier())


@pytest.mark.parametrize(("axis", "rank", "shape"), [(0, 1, (5,)), (1, 4, (1, 5, 1, 1)), (2, 3, (1, 1, 5))])
def test_channel_values_broadcast_along_their_axis(axis: int, rank: int, shape: tuple[int, ...]) -> None:
    found = along(np.arange(5), axis, rank)
    assert found.shape == shape
    assert found.ravel().tolist() == [0, 1, 2, 3, 4]


def test_initializers_are_constants_with_unused_names(model: ir.Model) -> None:
    weight = model.graph.initializers["w"]
    value = add_initializer(model.graph, unused_name(model.graph, "w"), 2 * array_of(weight).transpose(0, 1, 3, 2))
    assert (value.name, value.dtype, value.shape) == ("w_again", ir.DataType.FLOAT, ir.Shape([4, 3, 3, 3]))
    np.testing.assert_array_equal(array_of(value), 2 * array_of(weight).transpose(0, 1, 3, 2))
    assert constant_of(None) is constant_of(model.graph.inputs[0]) is None
    assert unused_name(model.graph, "w") == "w_again_again"


def test_a_replaced_node_keeps_the_name_and_the_readers_of_its_output(model: ir.Model) -> None:
    """max(x, 0) = (x + |x|) / 2"""
    images = np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)
    relu = next(node for node in model.graph if node.op_type == "Relu")
    data = relu.inputs[0]
    assert data is not None
    absolute = make_node("Abs", [data], name="absolute", like=data)
    total = make_node("Add", [data, absolute.outputs[0]], name="total", like=data, output="sum")
    half = make_node(
        "Mul",
        [total.outputs[0], add_initializer(model.graph, "half", np.asarray([0.5], np.float32))],
        name="h",
        like=data,
    )
    replace_node(model.graph, relu, [absolute, total, half])
    proto = ir.to_proto(model)
    check(proto)
    assert [node.op_type for node in proto.graph.node][1:4] == ["Abs", "Add", "Mul"]
    assert proto.graph.node[3].output[0] == "r"
    np.testing.assert_allclose(run_batches(proto, [images]), run_batches(classifier(), [images]), rtol=1e-5)


def test_a_cast_has_the_shape_of_its_input_and_its_own_type(model: ir.Model) -> None:
    data = model.graph.inputs[0]
    output = make_cast(data, ir.DataType.FLOAT16, name="cast", output="half").outputs[0]
    assert (output.name, output.dtype, output.shape) == ("half", ir.DataType.FLOAT16, data.shape)
