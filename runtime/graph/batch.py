"""Open the batch size of graphs that were exported for a fixed one."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

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
    """Return a copy in which constant shapes no longer contain the batch size.

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
        opened = None if int_attribute(node, "allowzero", 0) else _opened(node, target, batch, inferred)
        if opened is not None:
            node.input[1] = unused(f"{node.input[1]}_open")
            result.graph.initializer.append(numpy_helper.from_array(np.asarray(opened, np.int64), node.input[1]))
    return result


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
