"""Decide which tensors are quantized, by TensorRT's rules for explicit quantization.

The inputs of convolutions and matrix products are quantized: activations per tensor, weights per
output channel. Their outputs are not (a SiLU behind them needs the full range), nor are biases or
anything in between. On request, the input of a residual Add that does not come from a convolution
is quantized too; TensorRT can then fuse the Add into the convolution.

Source: NVIDIA, TensorRT Developer Guide, "Working with Quantized Types", Q/DQ placement
recommendations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import onnx

from runtime.errors import ConfigError, ModelFileError, nearest
from runtime.graph.model import tensor_types
from runtime.graph.structure import (
    WEIGHTED_OPS,
    initializers_of,
    int_attribute,
    is_depthwise,
    node_macs,
    output_channel_axis,
    shape_of,
)

__all__ = ["Point", "int8_share", "points_of", "residual_inputs"]

_KIND_REASONS = {
    "depthwise": "depthwise convolution",
    "gates": "layer of a gate, reads one value per channel",
    "first": "first layer",
    "last": "last layer",
}
_QUANTIZED_OPS = (
    *("QuantizeLinear", "DequantizeLinear", "QLinearConv", "ConvInteger", "MatMulInteger", "QLinearMatMul"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A quantization point: a convolution or matrix product, with the precision it computes in."""

    node: str
    """Name of the node."""
    op: str
    """Operator of the node."""
    tensor: str
    """Activation that it reads."""
    weight: str
    """Its weights; empty if they are not constant."""
    axis: int
    """Axis of the weights that holds the output channels."""
    macs: int
    """Multiply-accumulates for one image."""
    int8: bool
    """Whether it is quantized."""
    reason: str
    """How it is quantized, or why it is not."""


def points_of(model: onnx.ModelProto, keep: Collection[str] = (), leave: Collection[str] = ()) -> list[Point]:
    """Return a point for each convolution and matrix product of a float32 graph, in graph order.

    Args:
        model: a graph with unique node names.
        keep: names of nodes to keep in floating point.
        leave: kinds of layers to keep in floating point, from `calib.config.LAYER_KINDS`.

    Raises:
        ConfigError: `keep` names a node that is not a convolution or matrix product.
        ModelFileError: the graph is already quantized, has duplicate node names, or has nothing to
            quantize.
    """
    layers = [node for node in model.graph.node if node.op_type in WEIGHTED_OPS]
    _check_names(model, layers, keep)
    constants = initializers_of(model.graph)
    macs = node_macs(model)
    kinds = _kinds_to_leave(model, layers, leave)
    points = []
    for node in layers:
        constant = constants.get(node.input[1])
        reason = ""
        if constant is None:
            reason = "its weights are not constant"
        elif node.name in keep:
            reason = "kept in floating point"
        elif node.name in kinds:
            reason = f"kept in floating point: {_KIND_REASONS[kinds[node.name]]}"
        elif node.op_type == "ConvTranspose" and int_attribute(node, "group", 1) > 1:
            reason = "the output channels of a grouped ConvTranspose are not on one axis"
        rank = 2 if constant is None else len(constant.dims)
        transposed = bool(int_attribute(node, "transB", 0))
        points.append(
            Point(
                node=node.name,
                op=node.op_type,
                tensor=node.input[0],
                weight="" if constant is None else node.input[1],
                axis=output_channel_axis(node.op_type, rank, transposed=transposed),
                macs=macs.get(node.name, 0),
                int8=not reason,
                reason=reason or "activation per tensor, weights per output channel",
            )
        )
    if not any(point.int8 for point in points):
        raise ModelFileError(
            "there is nothing to quantize: no convolution or matrix product with constant weights is left"
        )
    return points


def int8_share(points: Iterable[Point]) -> float:
    """Return the share of the multiply-accumulates that are in INT8, 0 to 1."""
    points = list(points)
    total = sum(point.macs for point in points)
    return sum(point.macs for point in points if point.int8) / total if total else 0.0


def residual_inputs(model: onnx.ModelProto, points: Iterable[Point]) -> list[tuple[str, str]]:
    """Return (Add node, tensor) for each residual Add that follows a quantized convolution.

    The tensor is the Add's other input: the identity branch, or the output of a projected shortcut.
    """
    int8 = {point.node for point in points if point.int8 and point.op == "Conv"}
    convolved = {name for node in model.graph.node if node.name in int8 for name in node.output}
    constants = initializers_of(model.graph)
    readers = Counter(name for node in model.graph.node for name in node.input)
    found = []
    for node in model.graph.node:
        if node.op_type != "Add" or any(name in constants for name in node.input):
            continue
        fused = [name for name in node.input if name in convolved and readers[name] == 1]
        if fused:
            found.append((node.name, next(name for name in (*node.input, fused[0]) if name != fused[0])))
    return found


def _check_names(model: onnx.ModelProto, layers: list[onnx.NodeProto], keep: Collection[str]) -> None:
    quantized = sorted({node.op_type for node in model.graph.node if node.op_type in _QUANTIZED_OPS})
    if quantized:
        raise ModelFileError(f"the model is already quantized: it has {', '.join(quantized)}; pass the float32 file")
    names = [node.name for node in layers]
    if len(set(names)) < len(names) or "" in names:
        raise ModelFileError("the convolutions and matrix products of the model must have unique names")
    unknown = sorted(set(keep) - set(names))
    if unknown:
        raise ConfigError(f"no convolution or matrix product is called {unknown[0]!r}; {nearest(unknown[0], names)}")


def _kinds_to_leave(model: onnx.ModelProto, layers: list[onnx.NodeProto], leave: Collection[str]) -> dict[str, str]:
    """Return the first matching kind of each node that `leave` keeps in floating point."""
    constants = initializers_of(model.graph)
    types = tensor_types(model) if "gates" in leave else {}
    found = {}
    for place, node in enumerate(layers):
        weight = constants.get(node.input[1])
        is_conv = node.op_type == "Conv"
        matches = {
            "first": place == 0,
            "last": place == len(layers) - 1,
            "depthwise": is_conv and weight is not None and is_depthwise(int_attribute(node, "group", 1), weight.dims),
            "gates": is_conv and node.input[0] in types and shape_of(types[node.input[0]])[2:] == (1, 1),
        }
        kind = next((kind for kind in leave if matches[kind]), "")
        if kind:
            found[node.name] = kind
    return found
