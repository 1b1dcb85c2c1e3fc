"""Run FP16 and BF16 graphs on a CPU with the same roundings as on a GPU.

ONNX Runtime's CPU provider has few FP16 kernels: it computes an FP16 graph in FP32 and omits the
roundings between nodes, which hides overflows that a GPU would have. It cannot run BF16 at all.
`with_roundings` returns a float32 graph in which each node computes in FP32 and each FP16 or BF16
tensor is rounded to its type. (A GPU also accumulates convolutions in FP32 and then rounds the
result.)

Rounding is monotone, so an operator that only selects elements, such as max(0, x), returns the same
bits before and after it. The rounding is moved behind such operators: ONNX Runtime can then still
fuse Conv and Relu.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx
from onnx import TensorProto, helper, numpy_helper

from runtime.graph.model import tensor_types
from runtime.graph.read import read_onnx
from runtime.graph.structure import rename_tensors, tensor_names, unused_names
from runtime.graph.validation import external_files

__all__ = ["rounded_file", "rounded_name", "with_roundings"]

_NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_SUFFIXES = ("/rounded", "/unrounded", "/narrow")
"""Ends of the names of the tensors that are added."""
_SELECTING = frozenset(
    {"Clip", "Flatten", "Identity", "MaxPool", "Relu", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators that select elements of their first input or, for Clip, of its bounds."""


def with_roundings(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float32 graph that rounds each tensor that is FP16 or BF16 in `model`.

    Args:
        model: a graph with FP16 or BF16 tensors, and inputs and outputs of any type; not changed.

    Returns:
        A graph with the same inputs and outputs for ONNX Runtime on a CPU.
    """
    model = _without_our_names(model)
    narrow = _narrow_tensors(model)
    ends = {value.name for value in (*model.graph.input, *model.graph.output)}
    deferrable = narrow.keys() - ends - _read_by_others(model.graph.node)
    deferred: set[str] = set()  # tensors that are rounded only behind the node that reads them
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
        _widen_cast(copy)
        for position, name in enumerate(node.input):
            if name in narrow:
                copy.input[position] = rounded_name(name)
        selects_rounded = node.op_type in _SELECTING and node.input[0] in narrow and node.input[0] not in deferred
        for position, name in enumerate(node.output):
            if name not in narrow:
                continue
            if name not in ends and (selects_rounded or name in deferrable):
                copy.output[position] = rounded_name(name)
                if not selects_rounded:
                    deferred.add(name)
                continue
            copy.output[position] = name + _SUFFIXES[1]
            narrow_name = name if name in ends else name + _SUFFIXES[2]
            graph.node.append(_cast(name + _SUFFIXES[1], narrow_name, narrow[name]))
            graph.node.append(_cast(narrow_name, rounded_name(name), TensorProto.FLOAT))
    return rounded


def rounded_file(path: Path) -> bytes | str:
    """Return the serialized graph of an ONNX file with all roundings, or its path if it needs none.

    Raises:
        BackendUnavailable, ModelFileError: see `read_onnx`.
    """
    model = read_onnx(path)
    if external_files(model, path) or not _narrow_tensors(model):
        return str(path)
    return bytes(with_roundings(model).SerializeToString())


def rounded_name(tensor: str) -> str:
    """Return the name of an FP16 or BF16 tensor in the graph of `with_roundings`."""
    return tensor + _SUFFIXES[0]


def _without_our_names(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model, in which no inner tensor has a name that `with_roundings` creates."""
    ends = {value.name for value in (*model.graph.input, *model.graph.output)}
    clashing = {name for name in tensor_names(model.graph) - ends if name.endswith(_SUFFIXES)}
    if not clashing:
        return model
    renamed = onnx.ModelProto()
    renamed.CopyFrom(model)
    unused = unused_names(tensor_names(model.graph))
    rename_tensors(renamed.graph, {name: unused(f"{name}_") for name in sorted(clashing)})
    return renamed


def _narrow_tensors(model: onnx.ModelProto) -> dict[str, int]:
    constants = {tensor.name for tensor in model.graph.initializer}
    return {
        name: kind.elem_type
        for name, kind in tensor_types(model).items()
        if kind.elem_type in _NARROW and name not in constants
    }


def _read_by_others(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Return the tensors that are not only the first input of selecting operators."""
    return {
        name
        for node in nodes
        for position, name in enumerate(node.input)
        if node.op_type not in _SELECTING or position > 0
    }


def _widen_constants(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        if tensor.data_type in _NARROW:
            array = numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], to=kind)


def _widen_cast(node: onnx.NodeProto) -> None:
    """Make a Cast to FP16 or BF16 output float32, which is then rounded like any other tensor."""
    if node.op_type != "Cast":
        return
    for attribute in node.attribute:
        if attribute.name == "to" and attribute.i in _NARROW:
            attribute.i = TensorProto.FLOAT
