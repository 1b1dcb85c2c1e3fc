"""Infer the type and the shape of every tensor, also behind shapes that the graph itself computes.

ONNX's shape inference stops at a Reshape to a computed shape. Here the image size and the batch
size are set to numbers first. Whatever the graph computes from shapes is then constant, so it is
computed with ONNX's reference implementation, and inference continues behind it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from runtime.graph.model import without_weights
from runtime.graph.structure import graph_inputs, shape_of

__all__ = ["Inferred", "annotate", "batch_problem", "fold_shape_values", "infer", "shape_values"]

_MAX_ROUNDS = 500
_MAX_ELEMENTS = 1024
"""Largest tensor that is computed: shapes are much smaller."""
_SHAPE_OPS = frozenset(
    {
        *("Abs", "Add", "And", "Cast", "Ceil", "Clip", "Concat", "Constant", "ConstantOfShape", "Div", "Equal"),
        *("Expand", "Floor"),
        *("Gather", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg"),
        *("Not", "Or", "Range", "ReduceMax", "ReduceMin", "ReduceProd", "Reshape", "ScatterND", "Slice", "Split"),
        *("Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"),
    }
)
"""Operators that exporters compute shapes with."""
_GROWING_OPS = {"ConstantOfShape": 0, "Expand": 1, "Range": 1}
"""Operators whose output can be much larger than their inputs, and the input that sets its size."""


@dataclass(frozen=True, slots=True)
class Inferred:
    """The tensors of a graph at one batch size."""

    shapes: dict[str, tuple[int, ...]]
    """Tensor → its sizes, if all of them are known. Initializers are included."""
    types: dict[str, int]
    """Tensor → ONNX element type, if it is known."""
    values: dict[str, NDArray[Any]]
    """Tensor → its value, for small tensors that depend on shapes only, not on the image."""
    reason: str
    """Why inference failed; empty if it succeeded."""


def infer(model: onnx.ModelProto, batch: int, size: tuple[int, int] | None = None) -> Inferred:
    """Infer types and shapes at one batch size.

    Args:
        model: a graph with one input; not changed.
        batch: batch size.
        size: height and width, for an input whose image size is open.
    """
    light = without_weights(model)
    del light.graph.value_info[:]
    for value in light.graph.output:
        value.type.tensor_type.ClearField("shape")
    for value in graph_inputs(model.graph)[:1]:
        image = next(entry for entry in light.graph.input if entry.name == value.name)
        _set_sizes(image.type.tensor_type.shape.dim, batch, size)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in light.graph.initializer if _is_small(tensor)}
    graph, reason = light.graph, ""
    for _ in range(_MAX_ROUNDS):
        try:
            graph = onnx.shape_inference.infer_shapes(light, data_prop=True, strict_mode=True).graph
        except (onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            with suppress(onnx.shape_inference.InferenceError, ValueError, RuntimeError):
                graph = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
            break
        if not _compute(light, _known_shapes(graph), values):
            break
    constants = {tensor.name: tensor for tensor in (*light.graph.initializer, *model.graph.initializer)}
    entries = (*graph.value_info, *graph.input, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in entries}
    return Inferred(
        shapes=_known_shapes(graph) | {name: tuple(tensor.dims) for name, tensor in constants.items()},
        types={name: kind for name, kind in types.items() if kind}
        | {name: tensor.data_type for name, tensor in constants.items()},
        values=values,
        reason=reason,
    )


def batch_problem(model: onnx.ModelProto, batch: int, size: tuple[int, int] | None = None) -> str:
    """Return why the graph does not work with a batch size, as far as shapes show it, or ""."""
    inferred = infer(model, batch, size)
    output = model.graph.output[0].name
    found = inferred.shapes.get(output, (batch,))
    if not inferred.reason and found[:1] != (batch,):
        return f"for a batch size of {batch}, the output {output!r} has the shape {list(found)}"
    return inferred.reason


def shape_values(model: onnx.ModelProto, size: tuple[int, int] | None = None) -> dict[str, NDArray[Any]]:
    """Return the values that depend on the image size only, not on the image or the batch size."""
    sizes = shape_of(graph_inputs(model.graph)[0].type.tensor_type)
    batches = (sizes[0],) if sizes and sizes[0] > 0 else (1, 2, 3)
    first, *others = (infer(model, batch, size).values for batch in batches)
    return {
        name: value
        for name, value in first.items()
        if all(name in other and np.array_equal(value, other[name]) for other in others)
    }


def fold_shape_values(model: onnx.ModelProto) -> None:
    """Replace what a graph of a fixed image size computes from shapes by initializers, in place."""
    if any(size < 1 for size in shape_of(graph_inputs(model.graph)[0].type.tensor_type)[1:]):
        return
    values = shape_values(model)
    outputs = {value.name for value in model.graph.output}
    for node in [node for node in model.graph.node if outputs.isdisjoint(node.output)]:
        if all(name in values for name in node.output if name):
            model.graph.node.remove(node)
            model.graph.initializer.extend(numpy_helper.from_array(values[name], name) for name in node.output if name)


def annotate(model: onnx.ModelProto, size: tuple[int, int] | None = None) -> None:
    """Declare the type and the shape of every tensor in place, as far as they can be inferred.

    A size that depends on the batch size or on an open image size is left open. `size` is the
    height and width that shapes are inferred with if the image size is open.
    """
    inputs = graph_inputs(model.graph)
    dims = inputs[0].type.tensor_type.shape.dim if inputs else []
    fixed = dims[0].dim_value if dims else 1
    variants = [infer(model, fixed, size)] if fixed else [infer(model, batch, size) for batch in (2, 3)]
    if size is not None and any(not dim.HasField("dim_value") for dim in dims[1:]):
        variants.append(infer(model, fixed or 3, (size[0] + 32, size[1] + 64)))
    outputs = {value.name: value for value in model.graph.output}
    del model.graph.value_info[:]
    for node in model.graph.node:
        for name in node.output:
            if not name or name not in variants[0].types:
                continue
            value = helper.make_tensor_value_info(name, variants[0].types[name], _common_shape(name, variants, fixed))
            if name in outputs:
                outputs[name].type.CopyFrom(value.type)
            else:
                model.graph.value_info.append(value)


def _common_shape(name: str, variants: list[Inferred], fixed_batch: int) -> list[int | str | None] | None:
    """Return the sizes that all variants agree on; None for a shape that is not known."""
    shapes = [entry.shapes.get(name) for entry in variants]
    first = shapes[0]
    if first is None or any(shape is None or len(shape) != len(first) for shape in shapes):
        return None
    sizes: list[int | str | None] = []
    for axis, found in enumerate(zip(*(shape for shape in shapes if shape is not None), strict=True)):
        if len(set(found)) == 1:
            sizes.append(found[0])
        else:
            is_batch = axis == 0 and not fixed_batch and found[:2] == (2, 3)
            sizes.append("batch" if is_batch else None)
    return sizes


def _set_sizes(dims: Any, batch: int, size: tuple[int, int] | None) -> None:
    if not dims:
        return
    dims[0].dim_value = batch
    opened = [dim for dim in dims[1:] if not dim.HasField("dim_value") or dim.dim_value < 0]
    if size is not None and len(opened) == 2:
        opened[0].dim_value, opened[1].dim_value = size


def _known_shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and min(shape_of(kind), default=0) >= 0:
            shapes[value.name] = shape_of(kind)
    return shapes


def _is_small(tensor: onnx.TensorProto) -> bool:
    return math.prod(tensor.dims) <= _MAX_ELEMENTS and tensor.data_location != TensorProto.EXTERNAL


def _compute(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]], values: dict[str, NDArray[Any]]) -> bool:
    """Replace nodes whose result is known by initializers; return whether there were any."""
    kept = []
    for node in model.graph.node:
        found = _value_of(node, model, shapes, values)
        if found is None:
            kept.append(node)
            continue
        for name, array in found.items():
            values[name] = array
            model.graph.initializer.append(numpy_helper.from_array(array, name))
    changed = len(kept) < len(model.graph.node)
    if changed:
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    return changed


def _value_of(
    node: onnx.NodeProto,
    model: onnx.ModelProto,
    shapes: Mapping[str, tuple[int, ...]],
    values: Mapping[str, NDArray[Any]],
) -> dict[str, NDArray[Any]] | None:
    """Return the outputs of a node that depend on known shapes and constants only, or None."""
    if node.domain not in ("", "ai.onnx"):
        return None
    known = {name: values[name] for name in node.input if name in values}
    if node.op_type in ("Shape", "Size") and node.input[0] in shapes:
        known = {node.input[0]: np.broadcast_to(np.float32(0), shapes[node.input[0]])}  # takes no memory
    elif node.op_type not in _SHAPE_OPS or any(name and name not in values for name in node.input):
        return None
    if node.op_type in _GROWING_OPS and not _stays_small(node, known):
        return None
    from onnx.reference import ReferenceEvaluator

    graph = helper.make_graph(
        [node],
        "shape",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), None)
            for name, array in known.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in node.output if name],
    )
    names = [name for name in node.output if name]
    try:
        evaluator = ReferenceEvaluator(helper.make_model(graph, opset_imports=model.opset_import))
        arrays = [np.asarray(array) for array in evaluator.run(names, known)]
    except Exception:  # the reference implementation raises whatever its NumPy calls raise
        return None
    return dict(zip(names, arrays, strict=True)) if all(array.size <= _MAX_ELEMENTS for array in arrays) else None


def _stays_small(node: onnx.NodeProto, known: Mapping[str, NDArray[Any]]) -> bool:
    sizes = [known[name] for name in node.input]
    if node.op_type == "Range":
        start, limit, step = (float(value) for value in sizes)
        return step != 0 and (limit - start) / step <= _MAX_ELEMENTS
    target = sizes[_GROWING_OPS[node.op_type]]
    return math.prod(int(size) for size in target.ravel()) <= _MAX_ELEMENTS
