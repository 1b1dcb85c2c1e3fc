"""Edit graphs of ONNX IR: constants, new nodes, replaced nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from runtime.graph.structure import unused_names

__all__ = [
    "Names",
    "add_initializer",
    "along",
    "array_of",
    "constant_of",
    "make_cast",
    "make_node",
    "replace_node",
    "unused_name",
]

_Scalar = TypeVar("_Scalar", bound=np.generic)


def constant_of(value: ir.Value | None) -> NDArray[Any] | None:
    """Return the array of a constant value; None if the value is missing or computed."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def array_of(value: ir.Value | None) -> NDArray[Any]:
    """Return the array of a value that is known to be constant."""
    array = constant_of(value)
    assert array is not None
    return array


def along(values: NDArray[_Scalar], axis: int, rank: int) -> NDArray[_Scalar]:
    """Reshape (channels,) values to broadcast along `axis` of a tensor with `rank` dimensions."""
    return values.reshape([-1 if dimension == axis else 1 for dimension in range(rank)])


class Names:
    """Chooses names for new parts of a graph; a name that exists already gets a number."""

    def __init__(self, graph: ir.Graph) -> None:
        """Collect the names of a graph. Only names from this object may be added to it."""
        self.tensor = unused_names(_tensor_names(graph))
        """Returns an unused name for a tensor or initializer, and reserves it."""
        self.node = unused_names(node.name or "" for node in graph)
        """Returns an unused name for a node, and reserves it."""


def unused_name(graph: ir.Graph, name: str) -> str:
    """Return `name`, with `_again` appended until no tensor of the graph has it."""
    used = set(_tensor_names(graph))
    while name in used:
        name = f"{name}_again"
    return name


def _tensor_names(graph: ir.Graph) -> Iterator[str]:
    yield from graph.initializers
    yield from (value.name or "" for value in graph.inputs)
    yield from (value.name or "" for node in graph for value in node.outputs)


def add_initializer(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """Add a constant with the shape and dtype of `array` to the graph and return it."""
    tensor = ir.tensor(np.asarray(array, order="C"), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def make_node(
    op: str,
    inputs: Sequence[ir.Value],
    *,
    name: str,
    like: ir.Value,
    dtype: ir.DataType | None = None,
    output: str | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> ir.Node:
    """Create a node with one output; it belongs to no graph yet.

    Args:
        op: ONNX operator.
        inputs: values that the node reads.
        name: name of the node.
        like: the output gets the shape and the type of this value.
        dtype: element type of the output (default: that of `like`).
        output: name of the output (default: the graph chooses one).
        attributes: attributes of the node.
    """
    node = ir.node(op, list(inputs), attributes or {}, name=name)
    value = node.outputs[0]
    value.shape = like.shape
    value.type = like.type if dtype is None else ir.TensorType(dtype)
    if output is not None:
        value.name = output
    return node


def make_cast(value: ir.Value, dtype: ir.DataType, *, name: str, output: str | None = None) -> ir.Node:
    """Create a Cast of `value` to `dtype`; see `make_node`."""
    return make_node("Cast", [value], name=name, like=value, dtype=dtype, output=output, attributes={"to": int(dtype)})


def replace_node(graph: ir.Graph, node: ir.Node, replacements: Sequence[ir.Node]) -> None:
    """Insert `replacements` at the position of `node` and remove it.

    The output of the last replacement takes over name, type, shape and readers of the node's
    output.
    """
    old, new = node.outputs[0], replacements[-1].outputs[0]
    new.name, new.type, new.shape = old.name, old.type, old.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], list(replacements), [old], [new])
