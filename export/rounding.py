"""Runs an FP16 graph as a GPU would round it, on a CPU.

ONNX Runtime's CPU provider has few FP16 kernels: it computes an FP16 graph in FP32 and drops
the roundings in between, so an overflow that a GPU would have does not show. Here every
FP16 tensor is rounded for real: each node computes in FP32 and its result passes through
FP16. (A GPU accumulates FP16 convolutions in FP32 too and rounds the result.)
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["with_fp16_roundings"]


def with_fp16_roundings(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a float32 graph that rounds every tensor to FP16 where `model` has one in FP16.

    Args:
        model: a graph with FP16 tensors and float32 or FP16 inputs and outputs; unchanged.

    Returns:
        A graph of the same inputs and outputs for ONNX Runtime on a CPU.
    """
    inferred = onnx.shape_inference.infer_shapes(model).graph
    half = {
        value.name
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16
    }
    half -= {tensor.name for tensor in model.graph.initializer}
    ends = {value.name for value in (*model.graph.input, *model.graph.output)}
    rounded = onnx.ModelProto()
    rounded.CopyFrom(model)
    graph = rounded.graph
    del graph.node[:]
    del graph.value_info[:]
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            array = numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    inner = half - ends
    for name in half & {value.name for value in model.graph.input}:
        graph.node.append(helper.make_node("Cast", [name], [_wide(name)], to=TensorProto.FLOAT))
    for node in model.graph.node:
        copy = graph.node.add()
        copy.CopyFrom(node)
        if node.op_type == "Cast":
            for attribute in copy.attribute:
                if attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                    attribute.i = TensorProto.FLOAT
        for position, name in enumerate(node.input):
            if name in half:
                copy.input[position] = _wide(name)
        for position, name in enumerate(node.output):
            if name in half:
                copy.output[position] = name + "/unrounded"
                narrow = name + "/fp16" if name in inner else name
                graph.node.append(helper.make_node("Cast", [name + "/unrounded"], [narrow], to=TensorProto.FLOAT16))
                graph.node.append(helper.make_node("Cast", [narrow], [_wide(name)], to=TensorProto.FLOAT))
    return rounded


def _wide(name: str) -> str:
    return name + "/rounded"
