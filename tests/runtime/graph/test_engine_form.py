import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

import runtime
from advprop.cli import main
from runtime.errors import ModelFileError
from runtime.graph.engine_form import engine_form
from runtime.graph.model import run_batches
from runtime.graph.read import load_onnx
from runtime.graph.summary import summarize
from runtime.spec import ImageSizes
from tests.support.networks import classifier, graph

SHAPES = [[1, 3, 8, 8], [2, 3, 8, 8]]


def write(path: Path, model: onnx.ModelProto) -> Path:
    onnx.save(model, path)
    return path


def quantized(zero: int = 0, kind: type[np.signedinteger | np.unsignedinteger] = np.int8) -> onnx.ModelProto:
    """Build a quantized convolution with an int32 bias, as ONNX Runtime writes it."""
    model = graph(
        """q = QuantizeLinear(input, s, z) x = DequantizeLinear(q, s, z) w = DequantizeLinear <axis = 0> (wq, ws, wz)
        b = DequantizeLinear <axis = 0> (bq, bs, bz) a = Conv(x, w, b) p = GlobalAveragePool(a) logits = Flatten(p)""",
        s=0.05,
        ws=[0.01, 0.02, 0.03, 0.04],
        bs=[0.0005, 0.001, 0.0015, 0.002],
    )
    random = np.random.default_rng(0)
    integers = {
        "z": np.asarray(zero, kind), "wz": np.zeros(4, np.int8), "bz": np.zeros(4, np.int32),
        "wq": random.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
        "bq": random.integers(-999, 999, 4).astype(np.int32),
    }  # fmt: skip
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in integers.items())
    del model.graph.value_info[:]
    return model


def fixed_reshape() -> onnx.ModelProto:
    model = graph("a = Conv(input, w) p = GlobalAveragePool(a) logits = Reshape(p, to)", w=np.ones((4, 3, 1, 1)))
    model.graph.initializer.append(numpy_helper.from_array(np.asarray([1, 4]), "to"))
    return model


def test_a_file_that_tensorrt_reads_is_left_alone(tmp_path: Path) -> None:
    assert engine_form(write(tmp_path / "m.onnx", classifier()), SHAPES) is None


def test_integer_biases_become_the_floats_that_they_stand_for(tmp_path: Path) -> None:
    model = quantized()
    found = engine_form(write(tmp_path / "m.onnx", model), SHAPES)
    assert found is not None
    assert sum(node.op_type == "DequantizeLinear" for node in found.graph.node) == 2
    batch = np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(run_batches(found, [batch]), run_batches(model, [batch]))


def test_an_engine_of_onnx_runtimes_quantizer_is_int8(tmp_path: Path) -> None:
    info = runtime.build(write(tmp_path / "m.onnx", quantized()), sm=(89,))
    assert [layer.int8 for layer in info.layers] == [True]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (quantized(zero=3), "it has zero points that are not 0; TensorRT requires symmetric quantization"),
        (quantized(kind=np.uint8), "it is quantized to uint8; TensorRT requires int8"),
    ],
)
def test_inspect_reports_a_quantization_that_tensorrt_does_not_read(
    tmp_path: Path, model: onnx.ModelProto, reason: str
) -> None:
    path = write(tmp_path / "m.onnx", model)
    assert summarize(path).engine_problems == (reason,)
    result = CliRunner().invoke(main, ["inspect", str(path), "--json"])
    assert f"engine with TensorRT-RTX: no, {reason}" in result.output


def test_open_sizes_of_one_name_are_sizes_of_their_own(tmp_path: Path) -> None:
    """As Paddle's converter names them."""
    model = classifier()
    for size in (0, 2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[size].dim_param = "?"
    del model.graph.value_info[:]
    path = write(tmp_path / "m.onnx", model)
    info = runtime.build(path, sm=(89,), options=runtime.BuildOptions(image_sizes=ImageSizes.parse("48x192")))
    assert info.profiles[0]["input"]["opt"] == [8, 3, 48, 192]


def test_constant_shapes_follow_the_batch_size_of_the_engine(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", fixed_reshape())
    assert runtime.build(path, sm=(89,)).profiles[0]["input"]["max"][0] == 32
    assert engine_form(path, SHAPES[:1]) is None


def test_a_graph_for_one_image_is_refused_for_larger_batches(tmp_path: Path) -> None:
    body = "r = Reshape(input, to) p = GlobalAveragePool(r) s = Softmax <axis = 0> (p) f = Flatten(s)"
    model = graph(f"{body} logits = MatMul(f, w)", w=np.ones((3, 4)))
    model.graph.initializer.append(numpy_helper.from_array(np.asarray([1, 3, 8, 8]), "to"))
    del model.graph.value_info[:]
    path = write(tmp_path / "m.onnx", model)
    with pytest.raises(ModelFileError, match=r"m\.onnx works with a batch size of 1 only: .*; build it for a batch"):
        engine_form(path, SHAPES)


def test_operators_of_onnx_runtime_are_built(tmp_path: Path) -> None:
    model = classifier()
    node = model.graph.node[0]
    node.domain, node.op_type = "com.microsoft", "FusedConv"
    node.attribute.append(helper.make_attribute("activation", "Relu"))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert runtime.build(write(tmp_path / "m.onnx", model), sm=(89,)).precision == "fp32"


def test_weights_linked_next_to_the_model_are_read(tmp_path: Path) -> None:
    """As in the cache of Hugging Face: both files are links to a folder of blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    model = classifier()
    weights = model.graph.initializer[0].raw_data
    onnx.save(model, blobs / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (blobs / "m.onnx").rename(blobs / "aa11")
    (blobs / "m.data").rename(blobs / "bb22")
    (snapshot / "m.onnx").symlink_to("../../blobs/aa11")
    (snapshot / "m.data").symlink_to("../../blobs/bb22")
    assert load_onnx(snapshot / "m.onnx").graph.initializer[0].raw_data == weights
    assert summarize(snapshot / "m.onnx").weights == {"fp32": 108}
    assert runtime.build(snapshot / "m.onnx", tmp_path / "m.engine", sm=(89,)).precision == "fp32"


@pytest.mark.parametrize("location", ["../outside.data", "sub/../../outside.data", "/etc/passwd"])
def test_weights_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside.data").write_bytes(bytes(1000))
    model = classifier()
    weights = model.graph.initializer[0]
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value=location)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelFileError, match=re.escape("weights outside its folder")):
        load_onnx(folder / "m.onnx")
