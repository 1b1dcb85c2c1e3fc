"""ONNX files that declare more than they contain, refer to other files, or are not models."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

import runtime
from advprop.cli import main
from runtime.errors import ConfigError, ModelFileError
from runtime.graph.read import read_onnx
from runtime.graph.summary import summarize
from runtime.graph.validation import check_volumes
from tests.support import ROOT
from tests.support.fuzz_models import MODEL
from tests.support.networks import classifier, graph


def save(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "it is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is not an ONNX file"),
        (b"hello hello", "is not an ONNX file, or is truncated"),
        (
            MODEL.SerializeToString()[:-30],
            r"the field at byte \d+ declares [\d,]+ bytes, but only [\d,]+ are left",
        ),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "declares 18,446,744,073,709,551,615 bytes"),
        (b"\x3a" + b"\xff" * 20, "the number at byte 1 is too long"),
        (b"\x08\x09", "it has no graph or no IR version"),
        (b"\x3a\x02\x0a\x00" * 100_001, "more than 100,000 nodes"),
    ],
    ids=["empty", "png", "text", "cut", "length", "number", "no graph", "nodes"],
)
def test_bytes_that_are_not_a_model_are_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(ModelFileError, match=expected):
        runtime.build(tmp_path / "a.onnx")
    assert CliRunner().invoke(main, ["inspect", str(tmp_path / "a.onnx")]).exit_code == 2


def test_a_file_of_ten_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "a.onnx").open("wb") as file:
        file.truncate(10**10)  # sparse: occupies no disk space
    with pytest.raises(ModelFileError, match=r"has 10\.0 GB"):
        summarize(tmp_path / "a.onnx")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the size of a process in /proc")
def test_a_small_file_with_many_nodes_is_refused_before_parsing(tmp_path: Path) -> None:
    """The file has 40 MB, but its 20 million empty nodes would need gigabytes of memory."""
    body = b"\x0a\x00" * 20_000_000
    length = len(body)
    varint = bytearray()
    while length:
        varint.append(length & 127 | (128 if length > 127 else 0))
        length >>= 7
    (tmp_path / "a.onnx").write_bytes(b"\x08\x09\x3a" + varint + body)
    program = (
        "import pathlib, resource, sys, onnx\n"
        "from runtime.graph.summary import summarize\n"
        "lines = open('/proc/self/status').read().splitlines()\n"
        "used = next(int(line.split()[1]) << 10 for line in lines if line.startswith('VmSize'))\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20),) * 2)\n"
        "try: {}(pathlib.Path(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )

    def run(function: str) -> str:
        command = [sys.executable, "-c", program.format(function), str(tmp_path / "a.onnx")]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert "more than 100,000 nodes" in run("summarize")
    assert "MemoryError" in run("onnx.load") or "DecodeError" in run("onnx.load")


@pytest.mark.parametrize(
    ("dims", "data_type", "data", "expected"),
    [
        ([10**9, 10**9], TensorProto.FLOAT, b"abcd", r"'w' declares 1,0.* bytes; found 4 bytes"),
        ([4, 3, 3, 3], TensorProto.FLOAT, None, "declares 108 elements, that is 108 values; found 0 values"),
        ([4, -3], TensorProto.FLOAT, b"", r"negative size: \[4, -3\]"),
        ([1], 99, b"a", "has type 99"),
        ([1] * 65, TensorProto.FLOAT, b"abcd", "65 dimensions"),
        ([1], TensorProto.STRING, b"abcd", "declares 1 elements, that is 1 values; found 0 values"),
    ],
)
def test_missing_weights_are_found(
    tmp_path: Path, dims: list[int], data_type: int, data: bytes | None, expected: str
) -> None:
    model = classifier()
    tensor = model.graph.initializer[0]
    tensor.dims[:] = dims
    tensor.data_type = data_type
    if data is None:
        tensor.ClearField("raw_data")
    else:
        tensor.raw_data = data
    with pytest.raises(ModelFileError, match=expected):
        runtime.build(save(model, tmp_path / "a.onnx"))


def test_values_in_the_field_of_another_type_do_not_count(tmp_path: Path) -> None:
    model = classifier()
    model.graph.initializer.append(TensorProto(name="odd", data_type=TensorProto.INT8, dims=[1], float_data=[1.0]))
    with pytest.raises(ModelFileError, match="'odd' declares 1 elements, that is 1 values; found 0 values"):
        summarize(save(model, tmp_path / "a.onnx"))


def test_every_valid_encoding_of_a_tensor_is_accepted(tmp_path: Path) -> None:
    """Raw and typed data of every type that the installed onnx package has."""
    model = classifier()
    for name, value in TensorProto.DataType.items():
        if name in ("UNDEFINED", "STRING"):
            continue
        kind = helper.tensor_dtype_to_np_dtype(value)
        array = np.zeros(5, kind)
        model.graph.initializer.append(numpy_helper.from_array(array, f"raw_{name}"))
        model.graph.initializer.append(helper.make_tensor(f"typed_{name}", value, [5], np.zeros(5)))
    model.graph.initializer.append(numpy_helper.from_array(np.asarray([b"a", b"b"], object), "texts"))
    model.graph.initializer.append(helper.make_tensor("none", TensorProto.FLOAT, [0, 3], []))
    assert summarize(save(model, tmp_path / "a.onnx")).weights == {"fp32": 108}


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (
            {"location": "w", "length": "432"},
            "it declares 432 bytes from byte 0 of .*, which has 100 bytes",
        ),
        ({"location": "w", "length": "100"}, "needs 432 bytes; it declares 100 bytes"),
        ({"location": "w", "offset": "-5"}, "from byte -5 of"),
        ({"location": "w", "offset": "many"}, "is not a number"),
        ({"location": "a\0b"}, "refers to weights outside its folder"),
        ({"location": "link"}, "refers to weights outside its folder"),
        ({}, "refers to weights outside its folder"),
    ],
)
def test_external_weights_must_be_complete_and_inside_the_folder(
    tmp_path: Path, entries: dict[str, str], expected: str
) -> None:
    (tmp_path / "w").write_bytes(bytes(100))
    (tmp_path / "link").symlink_to("/etc/hostname")
    model = classifier()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    with pytest.raises(ModelFileError, match=expected):
        runtime.build(save(model, tmp_path / "a.onnx"))


def test_external_weights_of_a_node_attribute_are_checked_too(tmp_path: Path) -> None:
    model = graph("c = Constant<value: tensor = float[1] {1.0}>() logits = Mul(input, c)")
    tensor = model.graph.node[0].attribute[0].t
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/hostname")
    with pytest.raises(ModelFileError, match="outside its folder"):
        runtime.build(save(model, tmp_path / "a.onnx"))


@pytest.mark.parametrize(
    "body",
    [
        "s = Constant<value: tensor = int64[2] {100000, 100000}>() c = ConstantOfShape(s) logits = Mul(input, c)",
        "a = Constant<value: tensor = int64 {0}>() b = Constant<value: tensor = int64 {1000000000}>() "
        "d = Constant<value: tensor = int64 {1}>() c = Range(a, b, d) logits = Gather(input, c)",
        "s = Constant<value: tensor = int64[2] {50000, 50000}>() o = Constant<value: tensor = float[1] {1.0}>() "
        "c = Expand(o, s) logits = Gather(input, c)",
    ],
    ids=["ConstantOfShape", "Range", "Expand"],
)
def test_huge_constant_shapes_are_refused(tmp_path: Path, body: str) -> None:
    path = save(graph(body), tmp_path / "a.onnx")
    with pytest.raises(ModelFileError, match=r"has .* elements \(shape"):
        runtime.build(path)
    with pytest.raises(ModelFileError, match=r"has .* elements \(shape"):
        check_volumes(read_onnx(path), path)


def test_inputs_that_are_not_images_are_refused(tmp_path: Path) -> None:
    body = "p = GlobalAveragePool(input) logits = Flatten(p)"
    with pytest.raises(ConfigError, match="has more than 2,147,483,647 elements"):
        runtime.build(save(graph(body, 10**9, 10**9), tmp_path / "a.onnx"))
    for dims in ([], [1, 3], [1, 3, 0, 8]):
        model = graph(body)
        shape = model.graph.input[0].type.tensor_type.shape
        del shape.dim[:]
        for size in dims:
            shape.dim.add(dim_value=size)
        with pytest.raises(ModelFileError, match="expected images: four dimensions"):
            runtime.build(save(model, tmp_path / "a.onnx"))


def test_cycles_and_nodes_without_inputs(tmp_path: Path) -> None:
    model = graph("a = Cast<to: int = 1>(b) b = Cast<to: int = 1>(a) logits = Conv(input, a)")
    assert summarize(save(model, tmp_path / "a.onnx")).weights == {}
    del model.graph.node[2].input[:]
    with pytest.raises(
        ModelFileError, match=r"'Conv_2' \(Conv\) has 0 inputs and 1 outputs, expected at least 2 and 1"
    ):
        summarize(save(model, tmp_path / "a.onnx"))
