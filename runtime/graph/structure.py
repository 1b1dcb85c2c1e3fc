"""Look up parts of an ONNX model: inputs, attributes, shapes, and the layers that have weights.

`onnx` is imported only inside functions and its classes appear as `Any`, because modules that must
work without the package use these functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from runtime.spec import METADATA_KEY, ModelSpec

__all__ = [
    "WEIGHTED_OPS",
    "describe_node",
    "graph_inputs",
    "initializers_of",
    "int_attribute",
    "is_depthwise",
    "metadata",
    "node_macs",
    "opset_of",
    "output_channel_axis",
    "rename_tensors",
    "set_metadata",
    "shape_of",
    "spec_of",
    "tensor_names",
    "unused_names",
    "unused_prefix",
]

WEIGHTED_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that multiply by weights."""


def metadata(model: Any, key: str) -> str:
    """Return the value of `key` in `metadata_props`; empty if the model has no such entry."""
    return next((str(entry.value) for entry in model.metadata_props if entry.key == key), "")


def set_metadata(model: Any, entries: Mapping[str, str]) -> None:
    """Set entries of `metadata_props`; an empty value removes its entry, and other entries stay."""
    kept = {entry.key: entry.value for entry in model.metadata_props} | dict(entries)
    del model.metadata_props[:]
    for key, value in kept.items():
        if value:
            model.metadata_props.add(key=key, value=value)


def spec_of(model: Any, where: str) -> ModelSpec | None:
    """Return the spec stored in the model, or None. `where` names the file in errors.

    Raises:
        SpecError: the spec is not valid.
    """
    text = metadata(model, METADATA_KEY)
    return ModelSpec.from_json(text, where=where) if text else None


def opset_of(model: Any) -> int:
    """Return the version of the default operator set that the model imports, or 0."""
    return next((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def initializers_of(graph: Any) -> dict[str, Any]:
    """Return the graph's initializers by name."""
    return {tensor.name: tensor for tensor in graph.initializer}


def graph_inputs(graph: Any) -> list[Any]:
    """Return the inputs without an initializer, which a caller must pass."""
    constants = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in constants]


def shape_of(tensor_type: Any) -> tuple[int, ...]:
    """Return the sizes of a `TypeProto.Tensor`; -1 for a size that is open."""
    return tuple(max(size.dim_value, -1) if size.HasField("dim_value") else -1 for size in tensor_type.shape.dim)


def describe_node(node: Any) -> str:
    """Return name and operator of a node, for messages."""
    operator = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
    return f"the node {node.name or next(iter(node.output), '')!r} ({operator})"


def tensor_names(graph: Any) -> set[str]:
    """Return the names of all inputs, initializers and node outputs, subgraphs included."""
    names = {value.name for value in (*graph.input, *graph.initializer)}
    for node in graph.node:
        names.update(node.output)
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                names |= tensor_names(inner)
    return names


def rename_tensors(graph: Any, renamed: Mapping[str, str]) -> None:
    """Rename tensors of a graph and of its subgraphs in place, except the graph's inputs."""
    for value in (*graph.initializer, *graph.output, *graph.value_info):
        value.name = renamed.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                rename_tensors(inner, renamed)


def unused_names(used: Iterable[str]) -> Callable[[str], str]:
    """Return a function that makes a name unique by appending a number, and then reserves it."""
    reserved = set(used)

    def unused(name: str) -> str:
        candidate, number = name, 1
        while candidate in reserved:
            candidate, number = f"{name}_{number}", number + 1
        reserved.add(candidate)
        return candidate

    return unused


def unused_prefix(graph: Any, prefix: str) -> str:
    """Return `prefix`, extended until no name of a tensor or node in the graph begins with it."""
    used = tensor_names(graph) | {node.name for node in graph.node}
    while any(name.startswith(prefix) for name in used):
        prefix = f"_{prefix}"
    return prefix


def int_attribute(node: Any, name: str, default: int) -> int:
    """Return an integer attribute of a node."""
    return next((int(item.i) for item in node.attribute if item.name == name), default)


def is_depthwise(groups: int, weight_shape: Sequence[int]) -> bool:
    """Return whether a convolution with weights (out, in / groups, kernel…) is depthwise."""
    return groups > 1 and weight_shape[1] == 1


def output_channel_axis(op: str, rank: int, *, transposed: bool = False) -> int:
    """Return the axis of a layer's weights that holds its output channels.

    Args:
        op: one of WEIGHTED_OPS. The axis of a grouped ConvTranspose holds the channels of one group
            only.
        rank: number of dimensions of the weights.
        transposed: `transB` of a Gemm.
    """
    if op == "Conv":  # (out, in / groups, kernel…)
        return 0
    if op == "ConvTranspose":  # (in, out / groups, kernel…)
        return 1
    if op == "Gemm":  # (in, out), or (out, in) if transposed
        return 0 if transposed else 1
    return rank - 1  # MatMul: (…, in, out)


def node_macs(model: Any) -> dict[str, int]:
    """Return the multiply-accumulates of each convolution and matrix product for one image.

    Args:
        model: an `onnx.ModelProto` with unique node names. If it leaves the image size open, its
            spec's size is used.

    Returns:
        Node name → MACs, in graph order, of the nodes whose shapes are known.
    """
    from runtime.graph.shapes import infer

    spec = spec_of(model, "the model file")
    size = None if spec is None else (spec.preprocessing.height, spec.preprocessing.width)
    shapes = infer(model, 1, size).shapes
    macs: dict[str, int] = {}
    for number, node in enumerate(model.graph.node):
        if node.op_type not in WEIGHTED_OPS:
            continue
        data, weight, output = (shapes.get(name, ()) for name in (*node.input[:2], node.output[0]))
        if not (data and weight and output) or min(*data, *weight, *output) <= 0:
            continue
        if node.op_type == "ConvTranspose":
            count = math.prod(data) * math.prod(weight[1:])
        elif node.op_type == "Conv":
            count = math.prod(output) * math.prod(weight[1:])
        else:
            count = math.prod(output) * data[-2 if int_attribute(node, "transA", 0) else -1]
        macs[node.name or f"{node.op_type}_{number}"] = count
    return macs
