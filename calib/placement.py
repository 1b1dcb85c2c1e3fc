"""Which tensors are quantized, by TensorRT's rules for explicit quantization.

All inputs of convolutions and matrix products: activations per tensor, weights per output channel. Not their
outputs (a SiLU behind them wants the full range), no bias, nothing in between; of a residual Add the input
that is not a convolution's, where asked for, so that TensorRT can fuse the Add into the convolution.
Source: NVIDIA, TensorRT Developer Guide, "Working with Quantized Types", Q/DQ placement recommendations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import onnx

from runtime.errors import ConfigError, ModelFileError, nearest
from runtime.graph.model import tensor_types
from runtime.graph.summary import node_macs

__all__ = ["Point", "int8_share", "points_of", "residual_inputs"]

_WORDS = {
    "depthwise": "depthwise",
    "gates": "reads one number a channel, as gates do",
    "first": "the first layer",
    "last": "the last layer",
}
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "ConvInteger", "MatMulInteger", "QLinearMatMul")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A convolution or matrix product, and whether it computes in INT8."""

    node: str
    """Its name."""
    op: str
    """Its operator."""
    tensor: str
    """The activation it reads."""
    weight: str
    """Its weights; empty where they are not constant."""
    axis: int
    """The axis of its weights that is the output channel."""
    macs: int
    """Multiply-accumulates for one image."""
    int8: bool
    """Whether it is quantized."""
    reason: str
    """Why, or why not."""


def points_of(model: onnx.ModelProto, keep: Collection[str] = (), leave: Collection[str] = ()) -> list[Point]:
    """Returns every convolution and matrix product of a float32 graph, in order.

    Args:
        model: with unique node names.
        keep: names of nodes that stay in floating point.
        leave: kinds of layers that do, of `KINDS_LEFT`.

    Raises:
        ConfigError: `keep` names no such node.
        ModelFileError: the graph is quantized already, or there is nothing to quantize.
    """
    found = sorted({node.op_type for node in model.graph.node if node.op_type in _QUANTIZED})
    if found:
        raise ModelFileError(f"the model is quantized already: it has {', '.join(found)}; give the float32 file")
    names = [node.name for node in model.graph.node if node.op_type in _WEIGHTED]
    if len(set(names)) < len(names) or "" in names:
        raise ModelFileError("the convolutions and matrix products of the model need names of their own")
    unknown = sorted(set(keep) - set(names))
    if unknown:
        raise ConfigError(f"no convolution or matrix product is called {unknown[0]!r}; {nearest(unknown[0], names)}")
    constants = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    macs = node_macs(model)
    left = _left(model, leave)
    points = []
    for node in model.graph.node:
        if node.op_type not in _WEIGHTED:
            continue
        reason = ""
        if node.input[1] not in constants:
            reason = "its weights are not constant"
        elif node.name in keep:
            reason = "kept in floating point"
        elif node.name in left:
            reason = f"{left[node.name]}, left in floating point"
        elif node.op_type == "ConvTranspose" and _integer(node, "group", 1) > 1:
            reason = "the output channels of a grouped ConvTranspose lie on no one axis"
        points.append(
            Point(
                node=node.name,
                op=node.op_type,
                tensor=node.input[0],
                weight=node.input[1] if node.input[1] in constants else "",
                axis=_channel_axis(node, constants.get(node.input[1], 2)),
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
    """Returns the share of the multiply-accumulates that are in INT8, 0 to 1."""
    points = list(points)
    total = sum(point.macs for point in points)
    return sum(point.macs for point in points if point.int8) / total if total else 0.0


def residual_inputs(model: onnx.ModelProto, points: Iterable[Point]) -> list[tuple[str, str]]:
    """Returns (Add, tensor) of each residual Add behind a quantized convolution.

    The tensor is the other input: the identity, which others read too, or, behind a projected shortcut, the second.
    """
    int8 = {point.node for point in points if point.int8 and point.op == "Conv"}
    convolved = {name for node in model.graph.node if node.name in int8 for name in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    readers = Counter(name for node in model.graph.node for name in node.input)
    found = []
    for node in model.graph.node:
        if node.op_type != "Add" or any(name in constants for name in node.input):
            continue
        fused = [name for name in node.input if name in convolved and readers[name] == 1]
        if fused:
            found.append((node.name, next(name for name in (*node.input, fused[0]) if name != fused[0])))
    return found


def _left(model: onnx.ModelProto, leave: Collection[str]) -> dict[str, str]:
    """Nodes of the kinds that are left out, and what they are."""
    weighted = [node for node in model.graph.node if node.op_type in _WEIGHTED]
    types = tensor_types(model) if {"gates", "depthwise"} & set(leave) else {}
    found = {}
    for place, node in enumerate(weighted):
        kinds = {
            "first": place == 0,
            "last": place == len(weighted) - 1,
            "depthwise": node.op_type == "Conv" and _is_depthwise(node, types),
            "gates": node.op_type == "Conv" and _sizes(types, node.input[0])[2:] == [1, 1],
        }
        kind = next((kind for kind in leave if kinds[kind]), "")
        if kind:
            found[node.name] = _WORDS[kind]
    return found


def _is_depthwise(node: onnx.NodeProto, types: Mapping[str, onnx.TypeProto.Tensor]) -> bool:
    groups = _integer(node, "group", 1)
    return groups > 1 and _sizes(types, node.input[0])[1:2] == [groups]


def _sizes(types: Mapping[str, onnx.TypeProto.Tensor], name: str) -> list[int]:
    return [size.dim_value for size in types[name].shape.dim] if name in types else []


def _channel_axis(node: onnx.NodeProto, rank: int) -> int:
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if _integer(node, "transB", 0) else 1
    return rank - 1 if node.op_type == "MatMul" else 1  # (…, in, out); ConvTranspose: (in, out, …)


def _integer(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((item.i for item in node.attribute if item.name == name), default)
