"""Rewrite the parts of an ONNX file that TensorRT's parser does not read, without changing results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import ModelFileError
from runtime.graph.read import load_onnx, read_onnx
from runtime.graph.structure import graph_inputs, initializers_of, shape_of

__all__ = ["engine_form", "unreadable_parts"]


def engine_form(path: Path, shapes: Sequence[Sequence[int]]) -> Any | None:
    """Return the graph that TensorRT reads instead of the file; None if it reads the file itself.

    Args:
        path: the ONNX file.
        shapes: shapes of the image input for which the engine is built.

    Raises:
        ModelFileError: the graph works with one batch size only, and the engine has others.
    """
    from runtime.graph.fused import has_fused_operators, lower_fused_operators
    from runtime.graph.standard import convert_opset, separate_weights

    model = read_onnx(path)
    size = _open_size(model, shapes[0])
    largest_batch = max(shape[0] for shape in shapes)
    single = _fixed_batch_reason(model, largest_batch, size)
    fused = has_fused_operators(model)
    if not (single or fused or _shared_names(model) or _integer_biases(model)):
        return None
    result = load_onnx(path)
    separate_weights(result)
    for dim in _shared_names(result):
        dim.ClearField("dim_param")
    fold_integer_biases(result)
    if fused:
        result = convert_opset(result, size)
        lower_fused_operators(result, others_allowed=True)
    return _open_batch(path, result, single, size) if single else result


def unreadable_parts(model: Any) -> list[str]:
    """Return why TensorRT cannot build an engine from a quantized graph, one line per kind."""
    constants = initializers_of(model.graph)
    reasons = {}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            if node.op_type in ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"):
                reasons[node.op_type] = f"{node.op_type} is not an operator of TensorRT; expected Q/DQ nodes"
            continue
        zero = constants.get(node.input[2]) if len(node.input) > 2 else None
        if zero is not None and zero.data_type != _type("INT32") and _has_nonzero(zero):
            reasons["zero"] = "it has zero points that are not 0; TensorRT requires symmetric quantization"
        elif zero is not None and zero.data_type == _type("UINT8"):
            reasons["uint8"] = "it is quantized to uint8; TensorRT requires int8"
    return list(reasons.values())


def fold_integer_biases(model: Any) -> None:
    """Replace int32 constants behind a DequantizeLinear by the floats that it computes, in place.

    ONNX Runtime stores biases that way. TensorRT dequantizes int8 only.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = initializers_of(graph)
    for node in _integer_biases(model):
        integers, scale = (numpy_helper.to_array(constants[name]) for name in node.input[:2])
        zero = numpy_helper.to_array(constants[node.input[2]]) if len(node.input) > 2 and node.input[2] else np.int32(0)
        axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1)
        shape = [-1 if place == axis % integers.ndim else 1 for place in range(integers.ndim)]
        if scale.size > 1:
            scale, zero = scale.reshape(shape), np.reshape(zero, shape) if np.size(zero) > 1 else zero
        kind = helper.tensor_dtype_to_np_dtype(constants[node.input[1]].data_type)
        floats = ((integers - zero).astype(np.float32) * scale.astype(np.float32)).astype(kind)
        graph.initializer.append(numpy_helper.from_array(floats, node.output[0]))
        graph.node.remove(node)


def _type(name: str) -> int:
    from onnx import TensorProto

    return int(TensorProto.DataType.Value(name))


def _has_nonzero(tensor: Any) -> bool:
    from onnx import numpy_helper

    return not tensor.external_data and bool(np.any(numpy_helper.to_array(tensor)))


def _integer_biases(model: Any) -> list[Any]:
    """Return the DequantizeLinear nodes of constant int32 tensors."""
    constants = initializers_of(model.graph)
    return [
        node
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        and all(name in constants for name in node.input if name)
        and constants[node.input[0]].data_type == _type("INT32")
    ]


def _shared_names(model: Any) -> list[Any]:
    """Return the open sizes of the image input that share a name, which TensorRT takes for equal."""
    inputs = graph_inputs(model.graph)
    dims = inputs[0].type.tensor_type.shape.dim if inputs else []
    names = [dim.dim_param for dim in dims if dim.dim_param]
    return [dim for dim in dims if names.count(dim.dim_param) > 1]


def _open_size(model: Any, shape: Sequence[int]) -> tuple[int, int] | None:
    """Return height and width in `shape` if the image input leaves both open."""
    inputs = graph_inputs(model.graph)
    declared = shape_of(inputs[0].type.tensor_type) if inputs else ()
    opened = [length for length, size in zip(shape[1:], declared[1:], strict=False) if size < 0]
    return (opened[0], opened[1]) if len(opened) == 2 else None


def _fixed_batch_reason(model: Any, largest_batch: int, size: tuple[int, int] | None) -> str:
    """Return why the graph works with a batch size of 1 only; empty if it works with others."""
    from runtime.graph.shapes import batch_problem

    inputs = graph_inputs(model.graph)
    sizes = shape_of(inputs[0].type.tensor_type) if inputs else ()
    is_open = bool(sizes) and sizes[0] < 0
    constants = initializers_of(model.graph)
    fixed = any(
        node.op_type == "Reshape" and (node.input[1] in constants or _is_constant(model, node.input[1]))
        for node in model.graph.node
    )
    if not is_open or not fixed or largest_batch < 2:
        return ""
    reason = batch_problem(model, 2, size)
    return reason if reason and not batch_problem(model, 1, size) else ""


def _is_constant(model: Any, name: str) -> bool:
    return any(node.op_type == "Constant" and name in node.output for node in model.graph.node)


def _open_batch(path: Path, model: Any, reason: str, size: tuple[int, int] | None) -> Any:
    from runtime.graph.batch import open_reshapes
    from runtime.graph.equivalence import Reference

    opened = open_reshapes(model, 1, size)
    reference = Reference(model, model.graph.output[0].name, "NCHW", size)
    if not reference.agrees(opened, (1, 2)):
        raise ModelFileError(
            f"{path} works with a batch size of 1 only: {reason}",
            fix="build it for a batch size of 1, or export it with a dynamic batch size",
        )
    return opened
