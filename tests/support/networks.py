"""Tiny ONNX graphs that several tests use."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import numpy_helper


def graph(body: str, height: int = 8, width: int = 8, /, **weights: ArrayLike) -> onnx.ModelProto:
    """Build a graph from float32 `input` (batch, 3, height, width) to `logits` (batch, 4), with nodes named OP_NUMBER.

    `weights` are the initializers.
    """
    text = f"""<ir_version: 9, opset_import: ["" : 20]>
    g (float[batch, 3, {height}, {width}] input) => (float[batch, 4] logits) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array, np.float32), name))
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    return onnx.shape_inference.infer_shapes(model)


def classifier(height: int = 8, width: int = 8) -> onnx.ModelProto:
    """Build a convolution, a ReLU and a pooling with random weights."""
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3))
    body = "a = Conv(input, w) r = Relu(a) p = GlobalAveragePool(r) logits = Flatten(p)"
    return graph(body, height, width, w=weight)


def scale_initializer(model: onnx.ModelProto, name: str, factor: float) -> None:
    """Multiply an initializer by `factor`, in place."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))
