"""Open the batch size of graphs that were exported for a fixed one."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from runtime.graph.shapes import Inferred, infer
from runtime.graph.structure import graph_inputs, initializers_of, int_attribute, tensor_names, unused_names

__all__ = ["BATCH_NAME", "open_reshapes", "set_batch"]

BATCH_NAME = "batch"
"""Name of the open batch size."""


def set_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Return a copy whose input declares the batch size `batch`; 0 for an open one."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    size = graph_inputs(result.graph)[0].type.tensor_type.shape.dim[0]
    size.Clear()
    if batch:
        size.dim_value = batch
    else:
        size.dim_param = BATCH_NAME
    for value in result.graph.output:
        value.type.tensor_type.ClearField("shape")
    del result.graph.value_info[:]
    return result


def open_reshapes(model: onnx.ModelProto, batch: int, size: tuple[int, int] | None = None) -> onnx.ModelProto:
    """Return a copy in which constants no longer contain the batch size.

    It assumes that the batch is the outermost dimension of every tensor that is reshaped. The
    caller must compare the results.

    Args:
        model: a graph whose constants are initializers.
        batch: the batch size that its shapes were exported for.
        size: height and width of the images, if the graph leaves them open.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    inferred = infer(set_batch(model, batch), batch, size)
    constants = initializers_of(model.graph)
    unused = unused_names(tensor_names(result.graph))
    for node in result.graph.node:
        if node.op_type != "Reshape" or node.input[0] in inferred.values or node.input[1] not in constants:
            continue
        target = numpy_helper.to_array(constants[node.input[1]])
        has_empty_sizes = int_attribute(node, "allowzero", 0) and 0 in target
        opened = None if has_empty_sizes else _opened(node, target, batch, inferred)
        if opened is not None:
            del node.attribute[:]  # allowzero: a 0 now means an unchanged size
            node.input[1] = unused(f"{node.input[1]}_open")
            result.graph.initializer.append(numpy_helper.from_array(np.asarray(opened, np.int64), node.input[1]))
    _repeat_constants(result, batch, inferred)
    return result


def _repeat_constants(model: onnx.ModelProto, batch: int, inferred: Inferred) -> None:
    """Repeat constants that are joined with images, such as the class token of a transformer."""
    graph = model.graph
    constants = initializers_of(graph)
    unused = unused_names(tensor_names(graph))
    for node in [node for node in graph.node if node.op_type == "Concat" and int_attribute(node, "axis", 0) != 0]:
        others = [name for name in node.input if name not in constants and name not in inferred.values]
        if not others:
            continue
        for place, name in enumerate(node.input):
            if name not in constants or not constants[name].dims or constants[name].dims[0] != batch:
                continue
            array = numpy_helper.to_array(constants[name])[:1]
            texts = [unused(f"{name}_{part}") for part in ("one", "sizes", "batch", "shape", "repeated")]
            graph.initializer.append(numpy_helper.from_array(array, texts[0]))
            graph.initializer.append(numpy_helper.from_array(np.asarray(array.shape[1:], np.int64), texts[1]))
            before = [
                helper.make_node("Shape", [others[0]], [texts[2]], texts[2], start=0, end=1),
                helper.make_node("Concat", [texts[2], texts[1]], [texts[3]], texts[3], axis=0),
                helper.make_node("Expand", [texts[0], texts[3]], [texts[4]], texts[4]),
            ]
            node.input[place] = texts[4]
            position = next(index for index, entry in enumerate(graph.node) if entry.output[0] == node.output[0])
            for entry in reversed(before):
                graph.node.insert(position, entry)


def _opened(node: onnx.NodeProto, target: np.ndarray, batch: int, inferred: Inferred) -> list[int] | None:
    """Return the target shape of a Reshape with an open first size; None to leave it unchanged."""
    data, result = inferred.shapes.get(node.input[0]), inferred.shapes.get(node.output[0])
    if target.size == 0 or target[0] in (-1, 0):
        return None
    rest = [int(length) for length in target[1:]]
    if -1 not in rest:
        return [-1, *rest]
    if data and data[0] == target[0] == batch:
        return [0, *rest]
    return [-1, *result[1:]] if result else None
