"""Equalization: range moves between the channels of an activation and the weights that read it.

Where y goes only into convolutions, y / s and W · s give the same output, channel by channel of y. Small
channels grow towards the range of the largest, so the one scale of the tensor wastes less of them. For a
depthwise reader that costs nothing, since its weights have a scale for each channel; for others the
weights' own spread grows, so s is a compromise: max|y|^α / max|W|^(1 − α).

How y / s comes about, backwards from y, as long as nothing else reads what changes:

    y = conv(x)          W, b ← W / s, b / s
    y = relu(x)          x ← x / s
    y = x · σ(x)         x ← x / s, and σ reads x · s            SiLU; HardSwish likewise
    y = x · gate         x ← x / s; where the gate pools x too, the convolution behind the pool takes W · s
    y = pool(x)          x ← x / s

Every s is a power of two, so all of that is exact in binary floating point: the float32 network keeps its
output bit by bit.

Sources: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (1906.04721);
the compromise: Xiao et al., "SmoothQuant" (2211.10438).
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

from runtime.graph.edit import add_initializer
from runtime.graph.model import check, tensor_types

__all__ = ["ALPHAS", "equalizable", "equalized"]

ALPHAS = (0.5, 1.0)
"""Compromises worth trying; 1 gives activations all they want."""

_MOST = 256.0
"""A channel grows by no more than this: smaller ones are all but empty."""
_POOLS = ("AveragePool", "GlobalAveragePool", "MaxPool", "GlobalMaxPool", "ReduceMean")

_Edit = Callable[[ir.Graph, NDArray[np.float32]], None]


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one activation can be scaled."""

    edits: tuple[_Edit, ...]
    """What divides it by s, and what makes up for that."""
    readers: tuple[ir.Node, ...]
    """The convolutions and products whose weights count in the compromise."""


def equalizable(model: onnx.ModelProto, tensors: Iterable[str]) -> list[str]:
    """Returns those of `tensors` whose channels can be scaled."""
    values = _values(_loaded(model).graph)
    return [name for name in tensors if name in values and _plan(values[name]) is not None]


def equalized(
    model: onnx.ModelProto, maxima: Mapping[str, NDArray[np.floating]], alphas: Mapping[str, float]
) -> onnx.ModelProto:
    """Returns the model with the channels of some activations scaled.

    Args:
        model: a float32 graph; not changed.
        maxima: activation → largest magnitude of each channel, (channels,).
        alphas: activation → its compromise; those that cannot be scaled are passed over.
    """
    graph_model = _loaded(model)
    graph = graph_model.graph
    values = _values(graph)
    for name, alpha in alphas.items():
        plan = _plan(values[name])
        if plan is None:
            continue
        scales = _scales(maxima[name], _weight_maxima(plan.readers), alpha)
        for edit in plan.edits:
            edit(graph, scales)
    RemoveUnusedNodesPass()(graph_model)
    result = ir.to_proto(graph_model)
    check(result)
    return result


def _loaded(model: onnx.ModelProto) -> ir.Model:
    """The model with all shapes, by which gates are known."""
    loaded = ir.from_proto(model)
    types = tensor_types(model)
    for name, value in _values(loaded.graph).items():
        if value.shape is None and name in types:
            value.shape = ir.Shape([size.dim_value or None for size in types[name].shape.dim])
    return loaded


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    values = {value.name or "": value for value in graph.inputs}
    return values | {value.name or "": value for node in graph for value in node.outputs}


def _scales(maxima_C: NDArray[np.floating], weights_C: NDArray[np.floating], alpha: float) -> NDArray[np.float32]:
    """What each channel is divided by: powers of two, the largest channel's at most 1."""
    alive = (maxima_C > 0) & (weights_C > 0)
    scales = np.ones(len(maxima_C))
    if alive.any():
        wished = maxima_C[alive] ** alpha / weights_C[alive] ** (1 - alpha)
        wished = wished / wished[maxima_C[alive].argmax()]
        scales[alive] = 2.0 ** np.round(np.log2(np.clip(wished, 1 / _MOST, 1.0)))
    return scales.astype(np.float32)


def _weight_maxima(readers: Iterable[ir.Node]) -> NDArray[np.float64]:
    """Largest weight that reads each channel, as a share of its output channel's largest; 1 for depthwise readers."""
    found: NDArray[np.float64] | None = None
    for node in readers:
        weight = np.abs(_array(node.inputs[1])).astype(np.float64)
        if _is_depthwise(node):
            of_channel = np.ones(len(weight))
        else:
            if node.op_type == "Gemm" and not node.attributes.get_int("transB", 0):
                weight = weight.T
            weight = weight.reshape(*weight.shape[:2], -1).max(2)
            of_channel = (weight / np.maximum(weight.max(1, keepdims=True), 1e-30)).max(0)
        found = of_channel if found is None else np.maximum(found, of_channel)
    assert found is not None
    return found


def _plan(value: ir.Value) -> _Plan | None:
    """How `value` can be divided by s; None where that is not exact."""
    readers = [node for node, _ in value.uses()]
    if not readers or value.is_graph_output():
        return None
    edits: list[_Edit] = []
    for node in readers:
        made_up = _making_up(node, value)
        if made_up is None:
            return None
        edits.append(made_up)
    source = _divided(value, set(readers))
    return None if source is None else _Plan((*edits, *source), tuple(readers))


def _making_up(node: ir.Node, value: ir.Value) -> _Edit | None:
    """Multiplies the weights of a reader of `value` by s."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if node.inputs[0] is not value or weight is None or weight.const_value is None:
        return None
    if node.op_type == "Conv":
        groups = node.attributes.get_int("group", 1)
        if groups == 1:
            return lambda graph, scales: _reweigh(graph, node, scales.reshape(1, -1, *[1] * (_rank(weight) - 2)))
        if _is_depthwise(node):
            return lambda graph, scales: _reweigh(graph, node, scales.reshape(-1, *[1] * (_rank(weight) - 1)))
        return None
    if node.op_type == "Gemm" and not node.attributes.get_int("transA", 0):
        transposed = node.attributes.get_int("transB", 0)
        return lambda graph, scales: _reweigh(graph, node, scales if transposed else scales[:, None])
    return None


def _divided(value: ir.Value, known: set[ir.Node]) -> tuple[_Edit, ...] | None:
    """Divides `value` by s, given that its readers are among `known` ones."""
    node = value.producer()
    if node is None or value.is_graph_output() or not {reader for reader, _ in value.uses()} <= known:
        return None
    if node.op_type == "Conv" and node.inputs[1] is not None and node.inputs[1].const_value is not None:
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and bias.const_value is None:
            return None
        return (lambda graph, scales: _divide_conv(graph, node, scales),)
    first = node.inputs[0] if node.inputs else None
    if first is None:
        return None
    if node.op_type == "Relu" or (node.op_type in _POOLS and _is_spatial(node)):
        return _divided(first, {node})
    if node.op_type == "HardSwish":
        inner = _divided(first, {node})
        return None if inner is None else (*inner, lambda graph, scales: _gate_hard_swish(graph, node, scales))
    return _product(node) if node.op_type == "Mul" else None


def _product(node: ir.Node) -> tuple[_Edit, ...] | None:
    """x · σ(x), or x · gate with a gate of one number a channel."""
    for place in (0, 1):
        data, gate = node.inputs[place], node.inputs[1 - place]
        if data is None or gate is None:
            return None
        maker = gate.producer()
        if maker is not None and maker.op_type in ("Sigmoid", "HardSigmoid") and maker.inputs[0] is data:
            inner = _divided(data, {node, maker})
            return None if inner is None else (*inner, functools.partial(_restore, maker))
        if _is_gate(gate) and not _is_gate(data):
            return _gated(node, data)
    return None


def _gated(node: ir.Node, data: ir.Value) -> tuple[_Edit, ...] | None:
    """x · gate, where the gate may be made of the pooled x."""
    edits: list[_Edit] = []
    others = {reader for reader, _ in data.uses()} - {node}
    for pool in others:
        if pool.op_type not in _POOLS or not _is_spatial(pool):
            return None
        pooled = pool.outputs[0]
        for reader, _ in pooled.uses():
            made_up = _making_up(reader, pooled)
            if made_up is None:
                return None
            edits.append(made_up)
        if pooled.is_graph_output():
            return None
    inner = _divided(data, {node, *others})
    return None if inner is None else (*edits, *inner)


def _is_spatial(node: ir.Node) -> bool:
    """Pools over height and width only, with nothing but positive weights."""
    if node.op_type != "ReduceMean":
        return True
    axes = _array(node.inputs[1]).tolist() if len(node.inputs) > 1 else node.attributes.get_ints("axes", [])
    rank = _rank(node.inputs[0])
    return {axis % rank for axis in axes} == set(range(2, rank)) if rank > 2 else False


def _is_gate(value: ir.Value) -> bool:
    shape = value.shape
    return shape is not None and len(shape) == 4 and shape[2] == 1 and shape[3] == 1


def _is_depthwise(node: ir.Node) -> bool:
    weight = node.inputs[1]
    assert weight is not None
    assert weight.shape is not None
    groups = node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1
    return groups > 1 and weight.shape[0] == groups and weight.shape[1] == 1


def _rank(value: ir.Value | None) -> int:
    assert value is not None
    assert value.shape is not None
    return len(value.shape)


def _array(value: ir.Value | None) -> NDArray[np.float32]:
    assert value is not None
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy())


def _reweigh(graph: ir.Graph, node: ir.Node, factor: NDArray[np.float32]) -> None:
    """Gives the node weights of its own, multiplied."""
    weight = node.inputs[1]
    assert weight is not None
    name = _free_name(graph, f"{node.name}_equalized")
    node.replace_input_with(1, add_initializer(graph, name, _array(weight) * factor))


def _divide_conv(graph: ir.Graph, node: ir.Node, scales: NDArray[np.float32]) -> None:
    _reweigh(graph, node, np.float32(1) / scales.reshape(-1, *[1] * (_rank(node.inputs[1]) - 1)))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        name = _free_name(graph, f"{node.name}_equalized_bias")
        node.replace_input_with(2, add_initializer(graph, name, _array(node.inputs[2]) / scales))


def _free_name(graph: ir.Graph, name: str) -> str:
    """A convolution is changed twice where both its input and its output are scaled."""
    return f"{name}_again" if name in graph.initializers else name


def _restore(gate: ir.Node, graph: ir.Graph, scales: NDArray[np.float32]) -> None:
    """The gate of a SiLU reads what it did before."""
    data = gate.inputs[0]
    assert data is not None
    gate.replace_input_with(0, _times(graph, gate, data, scales))


def _gate_hard_swish(graph: ir.Graph, node: ir.Node, scales: NDArray[np.float32]) -> None:
    data, old = node.inputs[0], node.outputs[0]
    assert data is not None
    sigmoid = ir.node("HardSigmoid", [_times(graph, node, data, scales)], {"alpha": 1 / 6, "beta": 0.5})
    sigmoid.name = f"{node.name}_gate"
    product = ir.node("Mul", [data, sigmoid.outputs[0]], name=f"{node.name}_product")
    product.outputs[0].name, product.outputs[0].type, product.outputs[0].shape = old.name, old.type, old.shape
    graph.insert_before(node, [sigmoid, product])
    ir.convenience.replace_all_uses_with(old, product.outputs[0])
    graph.remove(node, safe=True)


def _times(graph: ir.Graph, reader: ir.Node, data: ir.Value, scales: NDArray[np.float32]) -> ir.Value:
    factor = add_initializer(graph, f"{reader.name}_restored_by", scales.reshape(1, -1, 1, 1))
    product = ir.node("Mul", [data, factor], name=f"{reader.name}_restored")
    product.outputs[0].type, product.outputs[0].shape = data.type, data.shape
    graph.insert_before(reader, product)
    return product.outputs[0]
