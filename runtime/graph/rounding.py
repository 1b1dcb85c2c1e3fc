"""Runs an FP16 or BF16 graph as a GPU would round it, on a CPU.

ONNX Runtime's CPU provider has few FP16 kernels: it computes an FP16 graph in FP32 and drops
the roundings in between, so an overflow that a GPU would have does not show; BF16 it cannot
run at all. Here every such tensor is rounded for real: each node computes in FP32 and its
result passes through the narrow type. (A GPU accumulates convolutions in FP32 too and rounds
the result.)

Rounding keeps the order of numbers, so max(0, x) and its like may be taken before it as well as
after, with the same bits: that leaves ONNX Runtime its fused Conv + Relu.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx
from onnx import TensorProto, helper, numpy_helper

from runtime.graph.guard import external_files
from runtime.graph.model import tensor_types
from runtime.graph.summary import read_onnx

__all__ = ["rounded_file", "rounded_name", "with_roundings"]

_NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_ORDERLY = frozenset({"Clip", "Flatten", "Identity", "MaxPool", "Relu", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that pick among the elements of their first input and, Clip, its bounds."""


def with_roundings(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a float32 graph that rounds every tensor where `model` has a narrow one.

    Args:
        model: a graph with FP16 or BF16 tensors, whose inputs and outputs are any; unchanged.

    Returns:
        A graph of the same inputs and outputs for ONNX Runtime on a CPU.
    """
    narrow = _narrow_tensors(model)
    ends = {value.name for value in (*model.graph.input, *model.graph.output)}
    later = narrow.keys() - ends - _read_otherwise(model.graph.node)
    unrounded: set[str] = set()
    rounded = onnx.ModelProto()
    rounded.CopyFrom(model)
    graph = rounded.graph
    del graph.node[:]
    del graph.value_info[:]
    _widen_constants(graph)
    for value in model.graph.input:
        if value.name in narrow:
            graph.node.append(_cast(value.name, rounded_name(value.name), TensorProto.FLOAT))
    for node in model.graph.node:
        copy = graph.node.add()
        copy.CopyFrom(node)
        _cast_to_wide(copy)
        for position, name in enumerate(node.input):
            if name in narrow:
                copy.input[position] = rounded_name(name)
        is_rounded = node.op_type in _ORDERLY and node.input[0] in narrow and node.input[0] not in unrounded
        for position, name in enumerate(node.output):
            if name not in narrow:
                continue
            if name not in ends and (is_rounded or name in later):
                copy.output[position] = rounded_name(name)
                unrounded |= set() if is_rounded else {name}
                continue
            copy.output[position] = name + "/unrounded"
            short = name if name in ends else name + "/narrow"
            graph.node.append(_cast(name + "/unrounded", short, narrow[name]))
            graph.node.append(_cast(short, rounded_name(name), TensorProto.FLOAT))
    return rounded


def rounded_file(path: Path) -> bytes | str:
    """Returns the ONNX file at `path` with all roundings, for ONNX Runtime; the path where none are missing.

    Raises:
        BackendUnavailable: the `onnx` package is missing.
        ModelFileError: no such file, or not ONNX.
    """
    model = read_onnx(path)
    if external_files(model, path) or not _narrow_tensors(model):
        return str(path)
    return bytes(with_roundings(model).SerializeToString())


def rounded_name(tensor: str) -> str:
    """Returns what the narrow tensor `tensor` is called in `with_roundings`' graph, where it is float32."""
    return tensor + "/rounded"


def _narrow_tensors(model: onnx.ModelProto) -> dict[str, int]:
    constants = {tensor.name for tensor in model.graph.initializer}
    return {
        name: kind.elem_type
        for name, kind in tensor_types(model).items()
        if kind.elem_type in _NARROW and name not in constants
    }


def _read_otherwise(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Tensors that some node reads that is not orderly, or not as its data."""
    return {
        name
        for node in nodes
        for position, name in enumerate(node.input)
        if node.op_type not in _ORDERLY or position > 0
    }


def _widen_constants(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        if tensor.data_type in _NARROW:
            array = numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], to=kind)


def _cast_to_wide(node: onnx.NodeProto) -> None:
    """Makes a Cast to a narrow type one to float32: its result is rounded like any other."""
    if node.op_type != "Cast":
        return
    for attribute in node.attribute:
        if attribute.name == "to" and attribute.i in _NARROW:
            attribute.i = TensorProto.FLOAT
