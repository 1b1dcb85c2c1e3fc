"""Checks of ONNX files from strangers, before a native parser or a builder sees them.

A small file can claim much: weights it does not hold, a million nodes, shapes of 10⁹ elements. Nothing here allocates
by what a file claims.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.errors import ModelFileError

__all__ = ["check_nodes", "check_tensors", "check_volumes", "external_files"]

_MOST_ELEMENTS = 2**31 - 1
"""Of a tensor, as TensorRT has it."""
_MOST_CONSTANT_ELEMENTS = 2**28
"""Of a tensor that is computed from nothing but the file: 1 GiB of FP32."""
_MOST_DIMENSIONS = 64
_SMALL_ELEMENTS = 1024
"""A weight that may be a shape."""

_BITS = {
    "BOOL": 8, "DOUBLE": 64, "FLOAT": 32, "BFLOAT16": 16, "FLOAT16": 16, "COMPLEX64": 64, "COMPLEX128": 128,
    "INT2": 2, "INT4": 4, "INT8": 8, "INT16": 16, "INT32": 32, "INT64": 64,
    "UINT2": 2, "UINT4": 4, "UINT8": 8, "UINT16": 16, "UINT32": 32, "UINT64": 64,
    "FLOAT4E2M1": 4, "FLOAT6E2M3": 6, "FLOAT6E3M2": 6, "FLOAT8E4M3FN": 8, "FLOAT8E4M3FNUZ": 8, "FLOAT8E5M2": 8,
    "FLOAT8E5M2FNUZ": 8, "FLOAT8E8M0": 8,
}  # fmt: skip
_LISTS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")


def check_tensors(model: Any, path: Path) -> None:
    """Compares what each tensor inside the file claims with what it holds.

    Raises:
        ModelFileError: a tensor of negative size, unknown type, or without its data.
    """
    for tensor in _tensors(model):
        bits = _bits(tensor, path)
        if _is_external(tensor):
            continue  # `external_files` looks
        elements = math.prod(tensor.dims)
        if tensor.HasField("raw_data"):
            found, expected = len(tensor.raw_data), -(-elements * bits // 8)
            fits = found == expected
        else:
            found = sum(len(getattr(tensor, name)) for name in _LISTS)
            expected = -(-elements // (8 // bits)) if 0 < bits < 8 else elements
            fits = found >= expected
        if not fits:
            unit = "bytes" if tensor.HasField("raw_data") else "numbers"
            raise ModelFileError(
                f"{path}: {_name(tensor)} claims {elements:,} elements, {expected:,} {unit}; it holds {found:,}"
            )


def check_nodes(model: Any, path: Path) -> None:
    """Looks at names, and counts the inputs and outputs of each node; unknown operators are passed over.

    Raises:
        ModelFileError: a name that is no text, or a node with fewer inputs or outputs than its operator has.
    """
    import onnx

    for text in _texts(model):
        if not isinstance(text, str):  # protobuf gives what is no UTF-8 as bytes
            raise ModelFileError(f"{path} is not a valid ONNX graph: {text[:40]!r} is no text")
    version = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    least: dict[str, tuple[int, int]] = {}
    for node in _nodes(model):
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type not in least:
            try:
                schema = onnx.defs.get_schema(node.op_type, min(max(version, 1), onnx.defs.onnx_opset_version()))
                least[node.op_type] = (schema.min_input, schema.min_output)
            except onnx.defs.SchemaError:
                least[node.op_type] = (0, 1)
        inputs, outputs = least[node.op_type]
        if len(node.input) < inputs or len(node.output) < outputs:
            raise ModelFileError(
                f"{path}: the node {node.name!r} ({node.op_type}) has {len(node.input)} inputs and {len(node.output)} "
                f"outputs, expected at least {inputs} and {outputs}"
            )


def external_files(model: Any, path: Path) -> list[Path]:
    """Returns the files beside `path` that hold weights, in order of their names.

    Raises:
        ModelFileError: one is outside the folder, is missing, or is shorter than the weights it is to hold.
    """
    files: dict[str, tuple[Path, int]] = {}
    for tensor in _tensors(model):
        if not _is_external(tensor):
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if location not in files:
            file = _beside(path, location)
            files[location] = (file, file.stat().st_size)
        file, size = files[location]
        expected = -(-math.prod(tensor.dims) * _bits(tensor, path) // 8)
        try:
            offset = int(entries.get("offset") or 0)
            length = int(entries.get("length") or expected)
        except ValueError as error:
            raise ModelFileError(f"{path}: the place of {_name(tensor)} in {file} is no number: {error}") from error
        if length != expected or offset < 0 or offset + length > size:
            raise ModelFileError(
                f"{path}: {_name(tensor)} needs {expected:,} bytes; it claims {length:,} from byte {offset:,} on of "
                f"{file}, which has {size:,}"
            )
    return [files[location][0] for location in sorted(files)]


def _beside(path: Path, location: str) -> Path:
    file = path.parent / location
    try:
        inside = path.parent.resolve() in file.resolve().parents
    except (ValueError, OSError, RuntimeError):  # a NUL in the name, a loop of links
        inside = False
    if not inside:
        raise ModelFileError(f"{path} wants weights from outside its folder: {str(file)!r}; refused")
    if not file.is_file():
        raise ModelFileError(f"{path} needs the file of its weights beside it: no such file: {file}")
    return file


def check_volumes(model: Any, path: Path) -> None:
    """Infers the shapes and refuses tensors that no builder can hold.

    Raises:
        ModelFileError: an input or a computed tensor of too many elements, by the sizes that are known.
    """
    import onnx

    light = onnx.ModelProto()
    light.CopyFrom(model)
    for tensor in light.graph.initializer:
        if math.prod(tensor.dims) > _SMALL_ELEMENTS:  # only shapes are read
            tensor.ClearField("raw_data")
            for name in _LISTS:
                tensor.ClearField(name)
    try:
        graph = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        graph = light.graph  # the builder will say what is wrong with it
    weights = {tensor.name for tensor in graph.initializer}
    inputs = {value.name for value in graph.input} - weights
    for node in graph.node:
        if node.op_type != "Shape" and any(name in inputs for name in node.input):
            inputs.update(node.output)
    for value in (*graph.input, *graph.value_info, *graph.output):
        sizes = [size.dim_value for size in value.type.tensor_type.shape.dim if size.dim_value > 0]
        if len(sizes) > _MOST_DIMENSIONS:
            raise ModelFileError(f"{path}: the tensor {value.name} has {len(sizes)} dimensions; refused")
        limit = _MOST_ELEMENTS if value.name in inputs else _MOST_CONSTANT_ELEMENTS
        if math.prod(sizes) > limit:
            raise ModelFileError(
                f"{path}: the tensor {value.name} has a shape of {math.prod(sizes):,} elements, {sizes}; no more than "
                f"{limit:,} are built; refused"
            )


def _graphs(model: Any) -> Iterator[Any]:
    """The graph, those within it, and the functions."""
    waiting = [model.graph, *model.functions]
    while waiting:
        graph = waiting.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    waiting.append(attribute.g)
                waiting.extend(attribute.graphs)


def _texts(model: Any) -> Iterator[Any]:
    """Everything that is compared, shown or opened."""
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
                yield value if isinstance(value, str | bytes) else value.name  # a function has names only
        for node in graph.node:
            yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
            for attribute in node.attribute:
                yield attribute.name


def _nodes(model: Any) -> Iterator[Any]:
    for graph in _graphs(model):
        yield from graph.node


def _tensors(model: Any) -> Iterator[Any]:
    """Every tensor of the file: weights and attributes, of subgraphs and functions too."""
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


def _bits(tensor: Any, path: Path) -> int:
    """Bits of an element; 0 for texts and for tensors that are not there."""
    from onnx import TensorProto

    if len(tensor.dims) > _MOST_DIMENSIONS:
        raise ModelFileError(f"{path}: {_name(tensor)} has {len(tensor.dims)} dimensions; refused")
    if any(size < 0 for size in tensor.dims):
        raise ModelFileError(f"{path}: {_name(tensor)} has a negative size: {list(tensor.dims)}")
    kinds = TensorProto.DataType
    try:
        kind = str(kinds.Name(tensor.data_type))
    except ValueError:
        kind = str(tensor.data_type)
    if kind in ("STRING", "UNDEFINED"):
        return 0
    if kind not in _BITS:
        raise ModelFileError(f"{path}: {_name(tensor)} is of the type {kind}, which this onnx package does not know")
    return _BITS[kind]


def _is_external(tensor: Any) -> bool:
    return bool(tensor.external_data) or tensor.data_location == tensor.EXTERNAL


def _name(tensor: Any) -> str:
    return f"the tensor {tensor.name!r}" if tensor.name else "a tensor without a name"
