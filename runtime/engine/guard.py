"""Checks of ONNX files from strangers, before a native parser or a builder sees them.

A small file can claim much: weights it does not hold, a million nodes, shapes of 10⁹ elements. Nothing here allocates
by what a file claims.
"""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.errors import ModelFileError

__all__ = ["check_bytes", "check_tensors", "check_volumes", "external_files"]

_MOST_BYTES = 2**31 - 1
"""What protobuf reads; larger models have their weights beside the file."""
_MOST_NODES = 100_000
_MOST_CHILDREN = 1_000_000
"""Nodes, weights, inputs and shapes of a graph."""
_MOST_ELEMENTS = 2**31 - 1
"""Of a tensor, as TensorRT has it."""
_MOST_CONSTANT_ELEMENTS = 2**28
"""Of a tensor that is computed from nothing but the file: 1 GiB of FP32."""
_MOST_DIMENSIONS = 64
_SMALL_ELEMENTS = 1024
"""A weight that may be a shape."""

_GRAPH, _NODE = 7, 1  # fields of ModelProto and of GraphProto
_BITS = {
    "FLOAT": 32, "DOUBLE": 64, "FLOAT16": 16, "BFLOAT16": 16, "BOOL": 8, "COMPLEX64": 64, "COMPLEX128": 128,
    "INT2": 2, "INT4": 4, "INT8": 8, "INT16": 16, "INT32": 32, "INT64": 64,
    "UINT2": 2, "UINT4": 4, "UINT8": 8, "UINT16": 16, "UINT32": 32, "UINT64": 64,
    "FLOAT4E2M1": 4, "FLOAT8E4M3FN": 8, "FLOAT8E4M3FNUZ": 8, "FLOAT8E5M2": 8, "FLOAT8E5M2FNUZ": 8, "FLOAT8E8M0": 8,
}  # fmt: skip
_LISTS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")


def check_bytes(path: Path) -> None:
    """Counts the parts of the graph in the file's own bytes, since a part of two bytes takes a hundred once it is read.

    Raises:
        ModelFileError: empty, beyond what protobuf reads, cut short, or of too many parts.
    """
    size = path.stat().st_size
    if size == 0:
        raise ModelFileError(f"{path} is not an ONNX file: it is empty")
    if size > _MOST_BYTES:
        raise ModelFileError(
            f"{path} has {size / 1e9:.1f} GB; an ONNX file has at most 2 GB, with larger weights in a file beside it"
        )
    counts: Counter[int] = Counter()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            for number, start, end in _fields(content, 0, size):
                if number == _GRAPH:
                    for child, _, _ in _fields(content, start, end):
                        counts[child] += 1
                        if counts[_NODE] > _MOST_NODES or counts.total() > _MOST_CHILDREN:
                            raise ModelFileError(
                                f"{path} has more than {_MOST_NODES:,} nodes or {_MOST_CHILDREN:,} parts; "
                                "no classifier has; refused"
                            )
        except (IndexError, _CutError) as error:
            raise ModelFileError(f"{path} is not an ONNX file, or is truncated: {error}") from error


class _CutError(Exception):
    """Bytes that are no protobuf message."""


def _fields(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields number, start and end of each field with a length in a message; others are passed over."""
    place = start
    while place < end:
        tag, place = _varint(content, place, end)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            _, place = _varint(content, place, end)
            continue
        if kind == 2:
            length, place = _varint(content, place, end)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise _CutError(f"byte {place - 1} begins nothing that protobuf knows")
        if number == 0 or place + length > end:
            raise _CutError(f"at byte {place} a part of {length:,} bytes begins, {end - place:,} are left")
        if kind == 2:
            yield number, place, place + length
        place += length


def _varint(content: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= end:
            raise _CutError("it ends within a number")
        byte = content[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise _CutError(f"at byte {place} a number is too long")


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


def _tensors(model: Any) -> Iterator[Any]:
    """Every tensor of the file: weights and attributes, of subgraphs and functions too."""
    graphs = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes.extend(graph.node)
            continue
        for attribute in nodes.pop().attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("sparse_tensor"):
                yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
            for sparse in attribute.sparse_tensors:
                yield from (sparse.values, sparse.indices)
            if attribute.HasField("g"):
                graphs.append(attribute.g)
            graphs.extend(attribute.graphs)


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
