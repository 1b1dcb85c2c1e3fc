"""Tiny graphs that several tests share."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper


def graph(body: str, height: int = 8, width: int = 8, **weights: np.ndarray) -> onnx.ModelProto:
    """A graph float32 `input` (batch, 3, height, width) → `logits` (batch, 4), its nodes named op_number."""
    text = f"""<ir_version: 9, opset_import: ["" : 20]>
    g (float[batch, 3, {height}, {width}] input) => (float[batch, 4] logits) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array, np.float32), name))
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    return onnx.shape_inference.infer_shapes(model)


def classifier(height: int = 8, width: int = 8) -> onnx.ModelProto:
    """One convolution, a ReLU and a pooling, of random weights."""
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3))
    body = "a = Conv(input, w) r = Relu(a) p = GlobalAveragePool(r) logits = Flatten(p)"
    return graph(body, height, width, w=weight)


def scale_weight(model: onnx.ModelProto, name: str) -> None:
    """A fault: one weight is not what it should be."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.1), name))
