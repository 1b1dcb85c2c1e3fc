"""Equalize channels: move range from the channels of an activation to the weights that read it.

If only convolutions read y, then y / s and W · s yield the same output, for each channel of y.
Small channels grow toward the range of the largest channel, so the single scale of the tensor
resolves them better. For a depthwise reader this costs nothing, because its weights have a scale
per channel. For other readers the weights of a channel spread further, so s is a compromise:
max|y|^α / max|W|^(1 − α).

y is divided by s going backward from y, as long as nothing else reads the changed tensors:

    y = conv(x)          W, b ← W / s, b / s
    y = relu(x)          x ← x / s
    y = x · σ(x)         x ← x / s, and σ reads x · s (SiLU; HardSwish in the same way)
    y = x · gate         x ← x / s; if the gate pools x, the convolution behind the pool gets W · s
    y = pool(x)          x ← x / s

Each s is a power of two, so all of this is exact in binary floating point: the output of the
float32 network does not change by a single bit.

Sources: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction"
(1906.04721); for the compromise: Xiao et al., "SmoothQuant" (2211.10438).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from runtime.graph.edit import add_initializer, along, array_of, constant_of, make_node, replace_node, unused_name
from runtime.graph.model import check, tensor_types
from runtime.graph.structure import is_depthwise

__all__ = ["ALPHAS", "equalizable_tensors", "equalize"]

ALPHAS = (0.5, 1.0)
"""Values of α to try; 1 equalizes the activation fully."""

_MAX_GAIN = 256.0
"""Maximum growth of a channel. Channels that need more are practically empty."""
_POOLS = ("AveragePool", "GlobalAveragePool", "MaxPool", "GlobalMaxPool", "ReduceMean")

_Edit = Callable[[ir.Graph, NDArray[np.float32]], None]
"""Edits a graph, given the scales of the channels."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one activation can be scaled."""

    edits: tuple[_Edit, ...]
    """Edits that divide it by s and compensate for that in its readers."""
    readers: tuple[ir.Node, ...]
    """Convolutions and matrix products that read it."""


def equalizable_tensors(model: onnx.ModelProto, tensors: Iterable[str]) -> list[str]:
    """Return the tensors whose channels can be scaled exactly."""
    values = _values_by_name(_to_ir(model).graph)
    return [name for name in tensors if name in values and _plan_for(values[name]) is not None]


def equalize(
    model: onnx.ModelProto, maxima: Mapping[str, NDArray[np.floating]], alphas: Mapping[str, float]
) -> onnx.ModelProto:
    """Return the model with the channels of some activations scaled.

    Args:
        model: a float32 graph; not changed.
        maxima: activation → largest magnitude of each channel, (channels,).
        alphas: activation → α; activations that cannot be scaled are skipped.
    """
    graph_model = _to_ir(model)
    graph = graph_model.graph
    values = _values_by_name(graph)
    for name, alpha in alphas.items():
        plan = _plan_for(values[name])
        if plan is None:
            continue
        scales = _channel_scales(maxima[name], _weight_maxima(plan.readers), alpha)
        for edit in plan.edits:
            edit(graph, scales)
    RemoveUnusedNodesPass()(graph_model)
    result = ir.to_proto(graph_model)
    check(result)
    return result


def _to_ir(model: onnx.ModelProto) -> ir.Model:
    """Convert to ONNX IR with all shapes known, which `_is_gate` needs."""
    graph_model = ir.from_proto(model)
    types = tensor_types(model)
    for name, value in _values_by_name(graph_model.graph).items():
        if value.shape is None and name in types:
            value.shape = ir.Shape([size.dim_value or None for size in types[name].shape.dim])
    return graph_model


def _values_by_name(graph: ir.Graph) -> dict[str, ir.Value]:
    values = {value.name or "": value for value in graph.inputs}
    return values | {value.name or "": value for node in graph for value in node.outputs}


def _channel_scales(
    maxima_C: NDArray[np.floating], weights_C: NDArray[np.floating], alpha: float
) -> NDArray[np.float32]:
    """Return the divisor of each channel: a power of two, at most 1."""
    used = (maxima_C > 0) & (weights_C > 0)
    scales = np.ones(len(maxima_C))
    if used.any():
        ideal = maxima_C[used] ** alpha / weights_C[used] ** (1 - alpha)
        ideal = ideal / ideal[maxima_C[used].argmax()]
        scales[used] = 2.0 ** np.round(np.log2(np.clip(ideal, 1 / _MAX_GAIN, 1.0)))
    return scales.astype(np.float32)


def _weight_maxima(readers: Iterable[ir.Node]) -> NDArray[np.float64]:
    """Return the largest weight per input channel, relative to the largest of its output channel.

    It is 1 for depthwise readers.
    """
    found: NDArray[np.float64] | None = None
    for node in readers:
        weight = np.abs(array_of(node.inputs[1])).astype(np.float64)
        if _is_channelwise(node):
            per_channel = np.ones(len(weight))
        else:
            if node.op_type == "Gemm" and not node.attributes.get_int("transB", 0):
                weight = weight.T
            weight = weight.reshape(*weight.shape[:2], -1).max(2)
            per_channel = (weight / np.maximum(weight.max(1, keepdims=True), 1e-30)).max(0)
        found = per_channel if found is None else np.maximum(found, per_channel)
    assert found is not None
    return found


def _plan_for(value: ir.Value) -> _Plan | None:
    """Return how `value` can be divided by s; None if that is not exact."""
    readers = [node for node, _ in value.uses()]
    if not readers or value.is_graph_output():
        return None
    edits: list[_Edit] = []
    for node in readers:
        edit = _multiply_weights(node, value)
        if edit is None:
            return None
        edits.append(edit)
    source = _divide(value, set(readers))
    return None if source is None else _Plan((*edits, *source), tuple(readers))


def _multiply_weights(node: ir.Node, value: ir.Value) -> _Edit | None:
    """Return the edit that multiplies the weights of a reader of `value` by s, or None."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if node.inputs[0] is not value or weight is None or weight.const_value is None:
        return None
    if node.op_type == "Conv":
        if node.attributes.get_int("group", 1) == 1:
            return functools.partial(_scale_weights, node, 1)
        return functools.partial(_scale_weights, node, 0) if _is_channelwise(node) else None
    if node.op_type == "Gemm" and not node.attributes.get_int("transA", 0):
        return functools.partial(_scale_weights, node, 1 if node.attributes.get_int("transB", 0) else 0)
    return None


def _divide(value: ir.Value, known: set[ir.Node]) -> tuple[_Edit, ...] | None:
    """Return the edits that divide `value` by s; None if impossible or read outside `known`."""
    node = value.producer()
    if node is None or value.is_graph_output() or not {reader for reader, _ in value.uses()} <= known:
        return None
    if node.op_type == "Conv" and node.inputs[1] is not None and node.inputs[1].const_value is not None:
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and bias.const_value is None:
            return None
        return (functools.partial(_divide_conv, node),)
    data = node.inputs[0] if node.inputs else None
    if data is None:
        return None
    if node.op_type == "Relu" or (node.op_type in _POOLS and _pools_height_and_width(node)):
        return _divide(data, {node})
    if node.op_type == "HardSwish":
        inner = _divide(data, {node})
        return None if inner is None else (*inner, functools.partial(_replace_hard_swish, node))
    return _divide_product(node) if node.op_type == "Mul" else None


def _divide_product(node: ir.Node) -> tuple[_Edit, ...] | None:
    """Handle x · σ(x), and x · gate with one gate value per channel."""
    for place in (0, 1):
        data, gate = node.inputs[place], node.inputs[1 - place]
        if data is None or gate is None:
            return None
        sigmoid = gate.producer()
        if sigmoid is not None and sigmoid.op_type in ("Sigmoid", "HardSigmoid") and sigmoid.inputs[0] is data:
            inner = _divide(data, {node, sigmoid})
            return None if inner is None else (*inner, functools.partial(_restore_input, sigmoid))
        if _is_gate(gate) and not _is_gate(data):
            return _divide_gated(node, data)
    return None


def _divide_gated(node: ir.Node, data: ir.Value) -> tuple[_Edit, ...] | None:
    """Handle x · gate if the gate may be computed from the pooled x."""
    edits: list[_Edit] = []
    others = {reader for reader, _ in data.uses()} - {node}
    for pool in others:
        if pool.op_type not in _POOLS or not _pools_height_and_width(pool):
            return None
        pooled = pool.outputs[0]
        for reader, _ in pooled.uses():
            edit = _multiply_weights(reader, pooled)
            if edit is None:
                return None
            edits.append(edit)
        if pooled.is_graph_output():
            return None
    inner = _divide(data, {node, *others})
    return None if inner is None else (*edits, *inner)


def _pools_height_and_width(node: ir.Node) -> bool:
    if node.op_type != "ReduceMean":
        return True
    constant = constant_of(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get_ints("axes", [])
    axes = [] if constant is None else np.asarray(constant).tolist()
    rank = _rank(node.inputs[0])
    return {axis % rank for axis in axes} == set(range(2, rank)) if rank > 2 else False


def _is_gate(value: ir.Value) -> bool:
    """Return whether the value has the shape (N, C, 1, 1)."""
    shape = value.shape
    return shape is not None and len(shape) == 4 and shape[2] == 1 and shape[3] == 1


def _is_channelwise(node: ir.Node) -> bool:
    """Return whether a node is a depthwise convolution with as many output as input channels."""
    weight = node.inputs[1]
    assert weight is not None
    assert weight.shape is not None
    groups = node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1
    return weight.shape[0] == groups and is_depthwise(groups, weight.shape.numpy())


def _rank(value: ir.Value | None) -> int:
    assert value is not None
    assert value.shape is not None
    return len(value.shape)


def _scale_weights(node: ir.Node, axis: int, graph: ir.Graph, factors: NDArray[np.float32]) -> None:
    """Replace the node's weights, which may be shared, with a copy multiplied along `axis`."""
    weight = array_of(node.inputs[1])
    name = unused_name(graph, f"{node.name}_equalized")
    node.replace_input_with(1, add_initializer(graph, name, weight * along(factors, axis, weight.ndim)))


def _divide_conv(node: ir.Node, graph: ir.Graph, scales: NDArray[np.float32]) -> None:
    _scale_weights(node, 0, graph, np.float32(1) / scales)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        name = unused_name(graph, f"{node.name}_equalized_bias")
        node.replace_input_with(2, add_initializer(graph, name, array_of(node.inputs[2]) / scales))


def _restore_input(sigmoid: ir.Node, graph: ir.Graph, scales: NDArray[np.float32]) -> None:
    """Make the sigmoid of a SiLU read the value from before the division."""
    data = sigmoid.inputs[0]
    assert data is not None
    sigmoid.replace_input_with(0, _insert_mul(graph, sigmoid, data, scales))


def _replace_hard_swish(node: ir.Node, graph: ir.Graph, scales: NDArray[np.float32]) -> None:
    """Replace HardSwish(x) with x · HardSigmoid(x · s)."""
    data = node.inputs[0]
    assert data is not None
    restored = _insert_mul(graph, node, data, scales)
    gate = make_node(
        "HardSigmoid", [restored], name=f"{node.name}_gate", like=data, attributes={"alpha": 1 / 6, "beta": 0.5}
    )
    product = make_node("Mul", [data, gate.outputs[0]], name=f"{node.name}_product", like=data)
    replace_node(graph, node, [gate, product])


def _insert_mul(graph: ir.Graph, reader: ir.Node, data: ir.Value, scales: NDArray[np.float32]) -> ir.Value:
    name = unused_name(graph, f"{reader.name}_restored_by")
    factor = add_initializer(graph, name, along(scales, 1, _rank(data)))
    product = make_node("Mul", [data, factor], name=f"{reader.name}_restored", like=data)
    graph.insert_before(reader, product)
    return product.outputs[0]
