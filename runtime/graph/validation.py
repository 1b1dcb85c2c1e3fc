"""Check untrusted ONNX files before a native parser or an engine builder reads them.

A small file can declare a lot: weights that it does not contain, a million nodes, shapes of 10⁹
elements. No check here allocates memory in proportion to what a file declares. `check_file` runs on
the raw bytes, the others on the parsed model.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.errors import ModelFileError
from runtime.graph.scan import MalformedError, TooLargeError, scan
from runtime.graph.structure import graph_inputs, opset_of

__all__ = ["check_file", "check_nodes", "check_tensors", "check_volumes", "external_files", "external_tensors"]

_MAX_BYTES = 2**31 - 1
"""Protobuf's limit; larger models store their weights externally."""
_MAX_ELEMENTS = 2**31 - 1
"""TensorRT's limit for one tensor."""
_MAX_CONSTANT_ELEMENTS = 2**28
"""Limit for a tensor that depends on constants only: 1 GiB of FP32."""
_MAX_DIMENSIONS = 64
_MAX_SHAPE_ELEMENTS = 1024
"""Larger constants cannot be shapes; shape inference does not need their values."""

_BITS = {
    "BOOL": 8, "DOUBLE": 64, "FLOAT": 32, "BFLOAT16": 16, "FLOAT16": 16, "COMPLEX64": 64, "COMPLEX128": 128,
    "INT2": 2, "INT4": 4, "INT8": 8, "INT16": 16, "INT32": 32, "INT64": 64,
    "UINT2": 2, "UINT4": 4, "UINT8": 8, "UINT16": 16, "UINT32": 32, "UINT64": 64,
    "FLOAT4E2M1": 4, "FLOAT6E2M3": 6, "FLOAT6E3M2": 6, "FLOAT8E4M3FN": 8, "FLOAT8E4M3FNUZ": 8, "FLOAT8E5M2": 8,
    "FLOAT8E5M2FNUZ": 8, "FLOAT8E8M0": 8,
}  # fmt: skip
_TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
_FIELDS = {
    "FLOAT": "float_data", "COMPLEX64": "float_data", "DOUBLE": "double_data", "COMPLEX128": "double_data",
    "INT64": "int64_data", "UINT32": "uint64_data", "UINT64": "uint64_data", "STRING": "string_data",
}  # fmt: skip
"""Type → field of its values; `int32_data` for all other types."""


def check_file(path: Path) -> None:
    """Check the raw bytes of an ONNX file. Every reader calls it first, also before native code.

    Raises:
        ModelFileError: the file is empty, larger than protobuf allows, truncated or unreadable, has
            too many parts, or refers to weights outside its folder.
    """
    try:
        size = path.stat().st_size
        if size == 0:
            raise ModelFileError(f"{path} is not an ONNX file: it is empty")
        if size > _MAX_BYTES:
            raise ModelFileError(
                f"{path} has {size / 1e9:.1f} GB; an ONNX file has at most 2 GB. Store larger weights in an external "
                "file"
            )
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            locations = scan(content)
    except MalformedError as error:
        raise ModelFileError(f"{path} is not an ONNX file, or is truncated: {error}") from error
    except TooLargeError as error:
        raise ModelFileError(f"{path} has {error}; rejected, because no classifier needs that") from error
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror or error}") from error
    for location in locations:
        _external_file(path, location)


def check_nodes(model: Any, path: Path) -> None:
    """Check that names are valid text, and that nodes have enough inputs and outputs.

    Raises:
        ModelFileError: a name is not UTF-8, or a node has fewer inputs or outputs than its operator
            requires.
    """
    import onnx

    for text in _texts(model):
        if not isinstance(text, str):  # protobuf returns invalid UTF-8 as bytes
            raise ModelFileError(f"{path} is not a valid ONNX graph: {text[:40]!r} is not valid text")
    version = min(max(opset_of(model), 1), onnx.defs.onnx_opset_version())
    required: dict[str, tuple[int, int]] = {}
    for node in _nodes(model):
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type not in required:
            try:
                schema = onnx.defs.get_schema(node.op_type, version)
                required[node.op_type] = (schema.min_input, schema.min_output)
            except onnx.defs.SchemaError:
                required[node.op_type] = (0, 1)
        inputs, outputs = required[node.op_type]
        if len(node.input) < inputs or len(node.output) < outputs:
            raise ModelFileError(
                f"{path}: the node {node.name!r} ({node.op_type}) has {len(node.input)} inputs and {len(node.output)} "
                f"outputs, expected at least {inputs} and {outputs}"
            )


def check_tensors(model: Any, path: Path) -> None:
    """Compare the declared size of each tensor with the data that the file contains.

    Raises:
        ModelFileError: a tensor has a negative size, an unknown type, or not the data that its
            shape requires.
    """
    from onnx import TensorProto

    for tensor in _tensors(model):
        bits = _bits_per_element(tensor, path)
        if _is_external(tensor):
            continue  # `external_files` checks those
        elements = math.prod(tensor.dims)
        if tensor.HasField("raw_data") and bits:
            found, expected = len(tensor.raw_data), -(-elements * bits // 8)
            fits = found == expected
        else:
            name = TensorProto.DataType.Name(tensor.data_type)
            found = len(getattr(tensor, _FIELDS.get(name, "int32_data")))
            expected = -(-elements // (8 // bits)) if 0 < bits < 8 else elements * (1 + name.startswith("COMPLEX"))
            fits = found >= expected
        if not fits:
            unit = "bytes" if tensor.HasField("raw_data") and bits else "values"
            raise ModelFileError(
                f"{path}: {_label(tensor)} declares {elements:,} elements, that is {expected:,} {unit}; "
                f"found {found:,} {unit}"
            )


def external_files(model: Any, path: Path) -> list[Path]:
    """Return the files of external weights next to `path`, sorted by name.

    Raises:
        ModelFileError: a file is outside the folder, missing, or shorter than the weights that it
            should hold.
    """
    files: dict[str, tuple[Path, int]] = {}
    for tensor in _tensors(model):
        if not _is_external(tensor):
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if location not in files:
            file = _external_file(path, location)
            files[location] = (file, file.stat().st_size)
        file, size = files[location]
        expected = -(-math.prod(tensor.dims) * _bits_per_element(tensor, path) // 8)
        try:
            offset = int(entries.get("offset") or 0)
            length = int(entries.get("length") or expected)
        except ValueError as error:
            raise ModelFileError(
                f"{path}: the position of {_label(tensor)} in {file} is not a number: {error}"
            ) from error
        if length != expected or offset < 0 or offset + length > size:
            raise ModelFileError(
                f"{path}: {_label(tensor)} needs {expected:,} bytes; it declares {length:,} bytes from byte {offset:,} "
                f"of {file}, which has {size:,} bytes"
            )
    return [files[location][0] for location in sorted(files)]


def external_tensors(model: Any) -> Iterator[Any]:
    """Yield the tensors whose data are in another file."""
    return (tensor for tensor in _tensors(model) if _is_external(tensor))


def check_volumes(model: Any, path: Path) -> None:
    """Infer shapes, and reject tensors that are too large for any builder.

    Raises:
        ModelFileError: an input or a computed tensor has too many elements, counting its known
            sizes only.
    """
    graph = _infer_shapes(model)
    from_input = {value.name for value in graph_inputs(graph)}
    for node in graph.node:
        if node.op_type != "Shape" and any(name in from_input for name in node.input):
            from_input.update(node.output)
    for value in (*graph.input, *graph.value_info, *graph.output):
        sizes = [size.dim_value for size in value.type.tensor_type.shape.dim if size.dim_value > 0]
        if len(sizes) > _MAX_DIMENSIONS:
            raise ModelFileError(
                f"{path}: the tensor {value.name} has {len(sizes)} dimensions; expected at most {_MAX_DIMENSIONS}"
            )
        limit = _MAX_ELEMENTS if value.name in from_input else _MAX_CONSTANT_ELEMENTS
        if math.prod(sizes) > limit:
            raise ModelFileError(
                f"{path}: the tensor {value.name} has {math.prod(sizes):,} elements (shape {sizes}); expected at most "
                f"{limit:,}"
            )


def _infer_shapes(model: Any) -> Any:
    """Return the graph with inferred shapes; if inference fails, without them."""
    import onnx

    light = onnx.ModelProto()
    light.CopyFrom(model)
    for tensor in light.graph.initializer:
        if math.prod(tensor.dims) > _MAX_SHAPE_ELEMENTS:
            tensor.ClearField("raw_data")
            for name in _TYPED_FIELDS:
                tensor.ClearField(name)
    try:
        return onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return light.graph


def _external_file(path: Path, location: str) -> Path:
    file = path.parent / location
    try:
        # The cache of Hugging Face links both files to another folder.
        folders = {path.parent.resolve(), path.resolve().parent}
        inside = ".." not in Path(location).parts and not folders.isdisjoint(file.resolve().parents)
        exists = file.is_file()
    except (ValueError, OSError, RuntimeError):  # a NUL in the name, or a loop of links
        inside = exists = False
    if not inside:
        raise ModelFileError(f"{path} refers to weights outside its folder, which is not allowed: {str(file)!r}")
    if not exists:
        raise ModelFileError(f"{path} needs its weights next to it: no such file: {file}")
    return file


def _graphs(model: Any) -> Iterator[Any]:
    """Yield the graph, all subgraphs, and all functions."""
    waiting = [model.graph, *model.functions]
    while waiting:
        graph = waiting.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    waiting.append(attribute.g)
                waiting.extend(attribute.graphs)


def _nodes(model: Any) -> Iterator[Any]:
    for graph in _graphs(model):
        yield from graph.node


def _texts(model: Any) -> Iterator[Any]:
    """Yield every text that is compared, displayed or used as a path."""
    for tensor in _tensors(model):
        yield tensor.name
        for entry in tensor.external_data:
            yield from (entry.key, entry.value)
    for entry in model.metadata_props:
        yield from (entry.key, entry.value)
    for opset in model.opset_import:
        yield opset.domain
    for graph in _graphs(model):
        for values in ("input", "output", "value_info"):
            for value in getattr(graph, values, ()):
                yield value if isinstance(value, str | bytes) else value.name  # functions list names only
        for node in graph.node:
            yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
            for attribute in node.attribute:
                yield attribute.name


def _tensors(model: Any) -> Iterator[Any]:
    """Yield all initializers and tensor attributes, including those of subgraphs and functions."""
    for graph in _graphs(model):
        yield from getattr(graph, "initializer", ())  # functions have none
        sparse = list(getattr(graph, "sparse_initializer", ()))
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                if attribute.HasField("sparse_tensor"):
                    sparse.append(attribute.sparse_tensor)
                sparse.extend(attribute.sparse_tensors)
        for pair in sparse:
            yield from (pair.values, pair.indices)


def _bits_per_element(tensor: Any, path: Path) -> int:
    """Check the dimensions; return the bits per element, 0 for strings and empty messages."""
    from onnx import TensorProto

    if len(tensor.dims) > _MAX_DIMENSIONS:
        raise ModelFileError(
            f"{path}: {_label(tensor)} has {len(tensor.dims)} dimensions; expected at most {_MAX_DIMENSIONS}"
        )
    if any(size < 0 for size in tensor.dims):
        raise ModelFileError(f"{path}: {_label(tensor)} has a negative size: {list(tensor.dims)}")
    try:
        name = str(TensorProto.DataType.Name(tensor.data_type))
    except ValueError:
        name = str(tensor.data_type)
    if name in ("STRING", "UNDEFINED"):
        return 0
    if name not in _BITS:
        raise ModelFileError(f"{path}: {_label(tensor)} has type {name}, which this version of onnx does not know")
    return _BITS[name]


def _is_external(tensor: Any) -> bool:
    return bool(tensor.external_data) or tensor.data_location == tensor.EXTERNAL


def _label(tensor: Any) -> str:
    return f"the tensor {tensor.name!r}" if tensor.name else "an unnamed tensor"
