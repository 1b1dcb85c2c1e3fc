"""Rewrite ONNX graphs of other tools in the form that advprop reads.

Weights are initializers and not graph inputs, local functions and constant conditions are inlined,
and all operators are standard operators of one opset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, inliner, numpy_helper, version_converter

from runtime.errors import ModelFileError, first_line
from runtime.graph.fused import lower_fused_operators
from runtime.graph.model import MIN_OPSET, OPSET, without_weights
from runtime.graph.shapes import annotate, shape_values
from runtime.graph.structure import describe_node, opset_of, rename_tensors, tensor_names, unused_names

__all__ = ["convert_opset", "name_nodes", "remove_unused", "separate_weights", "standard_form"]

_IR_VERSION = 10
"""IR version of the rewritten graphs: the newest that ONNX Runtime 1.23 reads."""
_LATER = "advprop.later"
"""Domain of nodes that are newer than the opset of their graph, while the opset is converted."""


def standard_form(model: onnx.ModelProto, size: tuple[int, int] | None = None) -> onnx.ModelProto:
    """Return an equivalent graph of standard operators, in opset `OPSET` if it can be converted.

    Args:
        model: a graph of any opset and precision, with its weights; not changed.
        size: height and width of the images, if the graph leaves them open.

    Raises:
        ModelFileError: a node has an operator or a subgraph that cannot be expressed that way, or
            the opset cannot be converted; the message names the node.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    separate_weights(result)
    if result.functions:
        result = _rewrite_without_weights(result, inliner.inline_local_functions)
    result = convert_opset(result, size)
    lower_fused_operators(result)
    inline_conditions(result, size)
    return result


def separate_weights(model: onnx.ModelProto) -> None:
    """Make every constant an initializer with raw data that is not a graph input, in place."""
    graph = model.graph
    kept = []
    for node in graph.node:
        tensor = _constant_tensor(node)
        if tensor is None:
            kept.append(node)
        else:
            graph.initializer.append(tensor)
    if len(kept) < len(graph.node):
        replace_nodes(graph, kept)
    constants = set()
    for tensor in graph.initializer:
        constants.add(tensor.name)
        is_here = tensor.data_location != onnx.TensorProto.EXTERNAL
        if is_here and not tensor.HasField("raw_data") and tensor.data_type != onnx.TensorProto.STRING:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    inputs = [value for value in graph.input if value.name not in constants]
    del graph.input[:]
    graph.input.extend(inputs)
    model.ir_version = _IR_VERSION  # up to version 3, initializers had to be inputs


def replace_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Replace the nodes of a graph, by some of its own nodes too."""
    copies = []
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    del graph.node[:]
    graph.node.extend(copies)


def inline_conditions(model: onnx.ModelProto, size: tuple[int, int] | None = None) -> None:
    """Replace each If whose condition depends on shapes only by the branch that runs, in place.

    Raises:
        ModelFileError: a condition depends on the image, or a node has another subgraph.
    """
    while any(node.op_type == "If" for node in model.graph.node):
        values = shape_values(model, size)
        unused = unused_names(tensor_names(model.graph))
        nodes: list[onnx.NodeProto] = []
        for node in model.graph.node:
            if node.op_type == "If":
                if node.input[0] not in values:
                    raise ModelFileError(
                        f"{describe_node(node)} chooses a branch by the content of an image or by the batch size; "
                        "expected a graph without conditions. Export the model again without data-dependent branches"
                    )
                nodes += _branch(model.graph, node, bool(values[node.input[0]]), unused)
            else:
                nodes.append(node)
        replace_nodes(model.graph, nodes)
    for node in model.graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise ModelFileError(
                f"{describe_node(node)} has a subgraph; expected a graph without loops and conditions. "
                "Export the model again without them"
            )


def name_nodes(model: onnx.ModelProto) -> None:
    """Rename nodes whose name is empty or not unique, in place."""
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.name] = counts.get(node.name, 0) + 1
    unused = unused_names(node.name for node in model.graph.node)
    for number, node in enumerate(model.graph.node):
        if not node.name or counts[node.name] > 1:
            node.name = unused(f"{node.op_type}_{number}")


def remove_unused(model: onnx.ModelProto) -> None:
    """Remove nodes and initializers that no output depends on, in place."""
    graph = model.graph
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if not needed.isdisjoint(node.output):
            kept.append(node)
            needed.update(node.input)
    if len(kept) < len(graph.node):
        replace_nodes(graph, kept[::-1])
    for position in reversed(range(len(graph.initializer))):
        if graph.initializer[position].name not in needed:
            del graph.initializer[position]


def _constant_tensor(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """Return the value of a Constant node as an initializer; None for other nodes."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx") or len(node.attribute) != 1:
        return None
    attribute = node.attribute[0]
    value: Any = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return numpy_helper.from_array(numpy_helper.to_array(value), node.output[0])
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if attribute.name not in kinds:
        return None  # strings and sparse tensors
    return numpy_helper.from_array(np.asarray(value, kinds[attribute.name]), node.output[0])


def _rewrite_without_weights(
    model: onnx.ModelProto, rewrite: Callable[[onnx.ModelProto], onnx.ModelProto]
) -> onnx.ModelProto:
    """Apply a function of the onnx package, which serializes the model, to a model of any size."""
    result = rewrite(without_weights(model))
    present = {tensor.name for tensor in result.graph.initializer}
    weights = [tensor for tensor in model.graph.initializer if tensor.name not in present]
    names = {tensor.name for tensor in weights}
    inputs = [value for value in result.graph.input if value.name not in names]
    del result.graph.input[:]
    result.graph.input.extend(inputs)
    for tensor in weights:
        result.graph.initializer.add().CopyFrom(tensor)  # extend fails above 2 GiB
    del result.metadata_props[:]
    result.metadata_props.extend(model.metadata_props)
    return result


def convert_opset(model: onnx.ModelProto, size: tuple[int, int] | None = None) -> onnx.ModelProto:
    """Return the graph in opset `OPSET`, or in a later one that cannot be converted.

    Raises:
        ModelFileError: the graph has an earlier opset that cannot be converted.
    """
    opset = opset_of(model)
    if opset == OPSET:
        return model
    later = _newer_nodes(model, opset)
    for node in later:
        node.domain = _LATER
    if later:
        model.opset_import.append(helper.make_opsetid(_LATER, 1))
    annotate(model, size)  # an old Softmax becomes a new one only if its input's rank is known
    try:
        result = _rewrite_without_weights(model, lambda light: version_converter.convert_version(light, OPSET))
    except (RuntimeError, ValueError) as error:
        if opset >= MIN_OPSET and not later:
            return model  # newer operators have no older form
        raise ModelFileError(
            f"opset {opset} cannot be converted to {OPSET} ({first_line(error)}); export the model with opset {OPSET}"
        ) from error
    for node in result.graph.node:
        if node.domain == _LATER:
            node.domain = ""
    imported = [(entry.domain, entry.version) for entry in result.opset_import if entry.domain != _LATER]
    del result.opset_import[:]
    result.opset_import.extend(helper.make_opsetid(*entry) for entry in imported)
    return result


def _newer_nodes(model: onnx.ModelProto, opset: int) -> list[onnx.NodeProto]:
    """Return the nodes whose operator did not exist in the graph's opset.

    ONNX Runtime's optimizer writes LayerNormalization into graphs of any opset.
    """
    return [
        node for node in model.graph.node if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type, opset)
    ]


def _branch(
    graph: onnx.GraphProto, node: onnx.NodeProto, condition: bool, unused: Callable[[str], str]
) -> list[onnx.NodeProto]:
    """Return the nodes of the branch that an If runs; its constants move to the graph.

    Branches of different nodes may use the same names, so all tensors are renamed.
    """
    wanted = "then_branch" if condition else "else_branch"
    branch = onnx.GraphProto()
    branch.CopyFrom(next(attribute.g for attribute in node.attribute if attribute.name == wanted))
    own = [tensor.name for tensor in branch.initializer]
    own += [output for inner in branch.node for output in inner.output if output]
    renamed = {name: unused(name) for name in own}
    rename_tensors(branch, renamed)
    graph.initializer.extend(branch.initializer)
    ends = [
        helper.make_node("Identity", [value.name], [output], name=f"{node.name}_{output}")
        for value, output in zip(branch.output, node.output, strict=True)
    ]
    return [*branch.node, *ends]
