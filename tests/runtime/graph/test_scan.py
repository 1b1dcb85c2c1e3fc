"""Small ONNX files that grow when they are parsed, and weights outside the model's folder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import runtime
from runtime.errors import ModelFileError
from runtime.graph.read import read_onnx
from runtime.graph.summary import summarize
from tests.support.fuzz_models import MODEL
from tests.support.networks import classifier

READERS: dict[str, Callable[[Path], object]] = {"load": runtime.load, "inspect": summarize, "build": runtime.build}
OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]


def functions(depth: int, calls: int, first: onnx.NodeProto | None = None) -> onnx.ModelProto:
    """Return a model whose functions each call the previous one `calls` times."""
    found = [helper.make_function("f", "F0", ["x"], ["y"], [first or helper.make_node("Relu", ["x"], ["y"])], OPSETS)]
    for level in range(1, depth + 1):
        names = ["x", *(f"a{number}" for number in range(calls - 1)), "y"]
        nodes = [
            helper.make_node(f"F{level - 1}", [names[number]], [names[number + 1]], domain="f")
            for number in range(calls)
        ]
        found.append(helper.make_function("f", f"F{level}", ["x"], ["y"], nodes, OPSETS))
    nodes = [
        helper.make_node(f"F{depth}", ["input"], ["a"], domain="f"),
        helper.make_node("GlobalAveragePool", ["a"], ["p"]),
        helper.make_node("Flatten", ["p"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])],
    )
    return helper.make_model(graph, opset_imports=OPSETS, ir_version=8, functions=found)


def save(content: bytes | onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    return path


def message(number: int, body: bytes) -> bytes:
    """Return a length-delimited protobuf field."""
    length, size = bytearray(), len(body)
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    tag = number << 3 | 2
    head = bytes([tag]) if tag < 128 else bytes([tag & 127 | 128, tag >> 7])
    return head + bytes(length) + bytes([size]) + body


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("depth", "calls"), [(25, 2), (3, 60), (62, 2)])
def test_functions_are_counted_as_expanded(tmp_path: Path, reader: str, depth: int, calls: int) -> None:
    path = save(functions(depth, calls), tmp_path / "bomb.onnx")
    assert path.stat().st_size < 20_000
    with pytest.raises(ModelFileError, match="more than 100,000 nodes once its functions are expanded"):
        READERS[reader](path)


def test_functions_with_large_constants_are_counted_by_their_bytes(tmp_path: Path) -> None:
    tensor = helper.make_tensor("c", TensorProto.FLOAT, [250_000], bytes(1_000_000), raw=True)
    path = save(functions(9, 2, helper.make_node("Constant", [], ["y"], value=tensor)), tmp_path / "a.onnx")
    with pytest.raises(ModelFileError, match="once its functions are expanded"):
        read_onnx(path)


@pytest.mark.parametrize("depth", [70, 3000])
def test_functions_that_call_too_deep_or_themselves_are_refused(tmp_path: Path, depth: int) -> None:
    path = save(functions(depth, 1), tmp_path / "deep.onnx")
    with pytest.raises(ModelFileError, match="call each other more than 64 levels deep"):
        runtime.load(path)
    model = functions(2, 1)
    model.functions[0].node[0].op_type, model.functions[0].node[0].domain = "F2", "f"
    with pytest.raises(ModelFileError, match="call each other"):
        runtime.load(save(model, tmp_path / "circle.onnx"))


def test_ordinary_functions_run(tmp_path: Path) -> None:
    images_NCHW = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    with runtime.load(save(functions(10, 2), tmp_path / "a.onnx")) as session:
        np.testing.assert_allclose(session.run(images_NCHW), np.maximum(images_NCHW, 0).mean((2, 3)), rtol=1e-4)


EMPTY = b"\x0a\x00"
"""An empty message in field 1: a node of a graph, a name of an attribute, …"""
PLACES: dict[str, bytes] = {
    "metadata of the model": b"\x72\x00" * 510_000,
    "operator sets": b"\x42\x00" * 510_000,
    "functions": b"\xca\x01\x00" * 510_000,
    "nodes": message(7, EMPTY * 120_000),
    "initializers": message(7, b"\x2a\x00" * 510_000),
    "attributes of a node": message(7, message(1, b"\x2a\x00" * 510_000)),
    "numbers of an attribute": message(7, message(1, message(5, b"\x40\x01" * 510_000))),
    "tensors of an attribute": message(7, message(1, message(5, b"\x52\x00" * 510_000))),
    "nodes of a subgraph": message(7, message(1, message(5, message(6, EMPTY * 120_000)))),
    "dimensions of a shape": message(7, message(11, message(2, message(1, message(2, EMPTY * 510_000))))),
    "several levels": message(7, b"\x2a\x00" * 300_000 + message(1, b"\x2a\x00" * 300_000)),
}


@pytest.mark.parametrize("place", PLACES)
def test_tiny_parts_are_counted_at_every_level_in_one_budget(tmp_path: Path, place: str) -> None:
    path = save(b"\x08\x09" + PLACES[place], tmp_path / "parts.onnx")
    with pytest.raises(ModelFileError, match=r"more than (500,000 parts|100,000 nodes)"):
        runtime.load(path)


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    body = b""
    for _ in range(60):
        body = message(1, message(5, message(6, body)))
    with pytest.raises(ModelFileError, match="nested more than 100 levels deep"):
        runtime.load(save(b"\x08\x09" + message(7, body), tmp_path / "deep.onnx"))


def external(location: str) -> onnx.ModelProto:
    model = classifier()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return model


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("location", ["ABSOLUTE", "../secret", "x/../../secret", "link", "folder/secret", "", "a\0b"])
def test_no_reader_opens_weights_outside_the_folder(tmp_path: Path, reader: str, location: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(np.full(108, 42, np.float32).tobytes())
    folder = tmp_path / "model"
    (folder / "x").mkdir(parents=True)
    (folder / "link").symlink_to(secret)
    (folder / "folder").symlink_to(tmp_path)
    model = external(str(secret) if location == "ABSOLUTE" else location)
    with pytest.raises(ModelFileError, match="refers to weights outside its folder"):
        READERS[reader](save(model, folder / "a.onnx"))


@pytest.mark.parametrize("reader", ["load", "inspect"])
def test_weights_in_the_folder_of_a_linked_model_are_read(tmp_path: Path, reader: str) -> None:
    """Hugging Face's cache keeps files in `blobs`, and links to them in `snapshots`."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "def").write_bytes(np.zeros(108, np.float32).tobytes())
    save(external("model.onnx.data"), blobs / "123")
    (snapshot / "model.onnx").symlink_to("../../blobs/123")
    (snapshot / "model.onnx.data").symlink_to("../../blobs/def")
    READERS[reader](snapshot / "model.onnx")


def test_weights_in_a_subgraph_and_in_a_function_are_found(tmp_path: Path) -> None:
    tensor = external("../secret").graph.initializer[0]
    in_function = functions(1, 1)
    in_function.functions[0].node.append(helper.make_node("Constant", [], ["c"], value=tensor))
    in_subgraph = onnx.ModelProto()
    in_subgraph.CopyFrom(MODEL)
    branch = next(node for node in in_subgraph.graph.node if node.op_type == "If")
    branch.attribute[0].g.initializer.append(tensor)
    for name, model in (("function", in_function), ("subgraph", in_subgraph)):
        with pytest.raises(ModelFileError, match="outside its folder"):
            runtime.load(save(model, tmp_path / f"{name}.onnx"))


def test_addresses_in_memory_are_not_weights(tmp_path: Path) -> None:
    """ONNX Runtime marks tensors that it holds in memory with this location."""
    with pytest.raises(ModelFileError, match="no such file"):
        runtime.load(save(external("*/_ORT_MEM_ADDR_/*"), tmp_path / "a.onnx"))


@pytest.mark.parametrize("location", ["ABSOLUTE", "../secret", "link"])
def test_onnx_runtime_itself_refuses_weights_outside_the_folder(tmp_path: Path, location: str) -> None:
    """The lower bound in pyproject.toml is the first release that does: a file that changes after
    our check is not read either."""
    import onnxruntime

    (tmp_path / "secret").write_bytes(np.zeros(108, np.float32).tobytes())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "link").symlink_to(tmp_path / "secret")
    model = external(str(tmp_path / "secret") if location == "ABSOLUTE" else location)
    path = save(model, tmp_path / "model" / "a.onnx")
    with pytest.raises(Exception, match="External data path"):
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
