import numpy as np
import onnx
import pytest

from runtime.graph.structure import (
    graph_inputs,
    int_attribute,
    is_depthwise,
    metadata,
    node_macs,
    opset_of,
    output_channel_axis,
    shape_of,
)
from runtime.spec import METADATA_KEY, ModelSpec, Preprocessing
from tests.support.networks import classifier, graph


@pytest.mark.parametrize(
    ("body", "weight", "macs"),
    [
        ("c = Conv<pads=[1, 1, 1, 1]>(input, w)", (5, 3, 3, 3), 8 * 8 * 5 * 3 * 9),
        ("c = Conv<group=3, strides=[2, 2]>(input, w)", (6, 1, 2, 2), 4 * 4 * 6 * 4),
        ("c = ConvTranspose<strides=[2, 2]>(input, w)", (3, 5, 2, 2), 8 * 8 * 3 * 5 * 4),
        ("f = Flatten(input) c = Gemm<transB=1>(f, w)", (7, 192), 192 * 7),
        ("f = Flatten(input) c = Gemm(f, w)", (192, 7), 192 * 7),
        ("c = MatMul(input, w)", (8, 5), 3 * 8 * 5 * 8),
    ],
    ids=["dense", "depthwise", "transposed", "Gemm transB", "Gemm", "MatMul"],
)
def test_macs_of_one_image_by_hand(body: str, weight: tuple[int, ...], macs: int) -> None:
    model = graph(f"{body} p = GlobalAveragePool(input) logits = Flatten(p)", w=np.ones(weight))
    assert list(node_macs(model).values()) == [macs]


def test_an_open_image_size_counts_as_the_size_in_the_spec() -> None:
    model = classifier()
    assert node_macs(model) == {"Conv_0": 6 * 6 * 4 * 27}
    for size, name in zip(model.graph.input[0].type.tensor_type.shape.dim[2:], ("height", "width"), strict=True):
        size.dim_param = name
    assert node_macs(model) == {}
    preprocessing = Preprocessing(
        height=10, width=12, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0
    )
    spec = ModelSpec(arch="x", classes=tuple("abcd"), preprocessing=preprocessing)
    model.metadata_props.add(key=METADATA_KEY, value=spec.to_json())
    assert node_macs(model) == {"Conv_0": 8 * 10 * 4 * 27}


def test_output_channels_of_weights() -> None:
    assert output_channel_axis("Conv", 4) == 0
    assert output_channel_axis("ConvTranspose", 4) == 1
    assert (output_channel_axis("Gemm", 2), output_channel_axis("Gemm", 2, transposed=True)) == (1, 0)
    assert output_channel_axis("MatMul", 3) == 2


def test_depthwise_convolutions_have_one_input_channel_per_group() -> None:
    assert is_depthwise(6, (6, 1, 3, 3))
    assert is_depthwise(6, (12, 1, 3, 3))
    assert not is_depthwise(1, (6, 1, 3, 3))
    assert not is_depthwise(2, (6, 3, 3, 3))


def test_lookups() -> None:
    model = classifier()
    assert [value.name for value in graph_inputs(model.graph)] == ["input"]
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [4, 3, 3, 3]))
    assert [value.name for value in graph_inputs(model.graph)] == ["input"]
    assert shape_of(model.graph.input[0].type.tensor_type) == (-1, 3, 8, 8)
    assert (opset_of(model), opset_of(onnx.ModelProto())) == (20, 0)
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], group=6)
    assert (int_attribute(node, "group", 1), int_attribute(node, "other", 1)) == (6, 1)
    model.metadata_props.add(key="a", value="b")
    assert (metadata(model, "a"), metadata(model, "c")) == ("b", "")
