"""Convert a float32 graph to FP16 or BF16, except nodes that overflow or lose accuracy.

The precision is part of the graph, because TensorRT 11 and TensorRT-RTX have no FP16 flag. The same
file then runs on every backend.

ONNX Runtime's own converter accepts a list of nodes to keep in FP32, but it rounds every tensor
between two such nodes to FP16, where a large tensor still overflows. Here a tensor has the type of
the node that computes it, and is cast only for readers of another type.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from runtime.graph.compare import TensorError
from runtime.graph.edit import Names, add_initializer, array_of, constant_of, make_cast
from runtime.graph.model import check
from runtime.graph.norms import NORMS_KEY

__all__ = [
    "LIMIT",
    "REDUCED",
    "Decision",
    "ToReduced",
    "deciding_tensors",
    "losses",
    "overflows",
    "to_reduced",
]

REDUCED = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
"""The precisions that a float32 graph can be converted to, by name."""

LIMIT = float(np.finfo(np.float16).max) / 2
"""Tensors that exceed this on the measured images stay in FP32. It is half of FP16's maximum of
65504, because other images can have larger values."""

_BF16_OPSET = 22
"""First opset in which convolutions can be BF16. The other operators used here are the same as in
opset 20."""

_FP32_OPS = frozenset({"Resize", "Upsample", "CumSum", "RandomNormalLike", "RandomUniformLike", "Range"})
"""Operators that have no FP16 version in ONNX or TensorRT, or require float32 inputs."""
_TYPE_SETTING_OPS = frozenset({"Cast", "CastLike", "Constant", "ConstantOfShape"})
"""Operators whose output type does not follow from their inputs; they are not changed."""
_AT_MOST_ONE = frozenset({"HardSigmoid", "Sigmoid", "Softmax", "Tanh"})
_NOT_LARGER = _AT_MOST_ONE | {
    *("AveragePool", "Flatten", "GlobalAveragePool", "GlobalMaxPool", "Identity", "MaxPool", "ReduceMax"),
    *("ReduceMean", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
}
"""Operators whose output magnitude is at most that of their inputs, or at most 1."""
_CLIPPING = frozenset({"Clip", "Relu"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A node that stays in FP32, and why."""

    node: str
    """Name of the node."""
    op: str
    """Its operator."""
    reason: Literal["overflow", "loss"]
    """`overflow`: a tensor exceeds LIMIT. `loss`: the node, or a node that reads it, has one of the
    largest errors."""
    tensor: str
    """The tensor that caused the decision."""
    amax: float
    """Its largest magnitude on the measured images."""
    error: float = 0.0
    """For `loss`: the error of the tensor in the reduced precision, relative to its largest
    magnitude."""


def deciding_tensors(model: onnx.ModelProto) -> set[str]:
    """Return the tensors whose ranges show whether any tensor may exceed LIMIT, a third of all."""
    nodes = model.graph.node
    producers = {name: node for node in nodes for name in node.output}
    readers: dict[str, set[str]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    tensors = {value.name for value in model.graph.input}
    for node in nodes:
        gated = node.op_type == "Mul" and any(
            name in producers and producers[name].op_type in _AT_MOST_ONE for name in node.input
        )
        if node.op_type in _CLIPPING or not (gated or node.op_type in _NOT_LARGER):
            tensors |= set(node.output)
    # If only a Relu reads a tensor, its output decides: negative values that overflow are zero
    # behind it.
    return {name for name in tensors if not (len(readers.get(name, ())) == 1 and readers[name] <= _CLIPPING)}


def overflows(model: onnx.ModelProto, amax: Mapping[str, float]) -> list[Decision]:
    """Return the nodes that read or write a tensor that exceeds LIMIT or is not finite.

    Args:
        model: a float32 graph.
        amax: largest magnitude of each tensor. If it has the deciding tensors only, the result is
            empty if and only if no tensor overflows, but it does not list all nodes.
    """
    graph = ir.from_proto(model).graph
    ranges = {name: value if np.isfinite(value) else float("inf") for name, value in amax.items()}
    for name, value in graph.initializers.items():
        array = constant_of(value)
        if value.dtype == ir.DataType.FLOAT and array is not None:
            ranges[name] = float(np.abs(array).max()) if array.size else 0.0
    decisions = []
    for node in graph:
        names = [value.name for value in (*node.inputs, *node.outputs) if value is not None and value.name in ranges]
        worst = max(names, key=lambda name: ranges[name], default=None)
        if worst is not None and ranges[worst] > LIMIT:
            decisions.append(
                Decision(node=node.name or "", op=node.op_type, reason="overflow", tensor=worst, amax=ranges[worst])
            )
    return decisions


def losses(
    model: onnx.ModelProto, errors: Iterable[TensorError], amax: Mapping[str, float], count: int
) -> list[Decision]:
    """Return the `count` nodes that add the largest errors, and the nodes whose outputs they read.

    The producers matter because a difference of two large numbers loses accuracy when the numbers
    are rounded, not when they are subtracted.

    Args:
        model: the float32 graph.
        errors: errors of its tensors in the reduced precision; see
            `runtime.graph.compare.graph_errors`.
        amax: largest magnitudes, for the record.
        count: number of nodes to choose by their own error.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    decisions: dict[str, Decision] = {}
    for entry in sorted(errors, key=lambda entry: -entry.added)[:count]:
        node = producers[entry.tensor]
        sources = [producers[name] for name in node.input if name in producers]
        for kept in (node, *sources):
            decisions.setdefault(
                kept.name,
                Decision(
                    node=kept.name,
                    op=kept.op_type,
                    reason="loss",
                    tensor=entry.tensor,
                    amax=amax.get(entry.tensor, 0.0),
                    error=entry.error,
                ),
            )
    return list(decisions.values())


def to_reduced(model: onnx.ModelProto, precision: str, keep: Iterable[Decision] = ()) -> onnx.ModelProto:
    """Convert a float32 graph to FP16 or BF16; its input and output stay float32.

    Args:
        model: not changed.
        precision: a key of REDUCED.
        keep: nodes that stay in FP32.
    """
    graph_model = ir.from_proto(model)
    ToReduced(REDUCED[precision], keep=[decision.node for decision in keep])(graph_model)
    if precision == "bf16":
        graph_model.graph.opset_imports[""] = _BF16_OPSET
    graph_model.metadata_props.pop(NORMS_KEY, None)  # only float32 files are adapted
    converted = ir.to_proto(graph_model)
    check(converted)
    return converted


class ToReduced(ir.passes.InPlacePass):
    """Converts nodes to a reduced precision; the graph's inputs and outputs stay float32."""

    def __init__(self, kind: ir.DataType = ir.DataType.FLOAT16, keep: Iterable[str] = ()) -> None:
        """Convert to `kind`, FLOAT16 or BFLOAT16, and keep the nodes named in `keep` in FP32."""
        super().__init__()
        self._kind = kind
        self._keep = frozenset(keep)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        names = Names(graph)
        casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        converted: dict[ir.Value, ir.Value] = {}
        for node in list(graph):
            kind = self._kind if self._is_convertible(node) else ir.DataType.FLOAT
            for position, value in enumerate(node.inputs):
                if value is None or not _is_float(value) or value.dtype == kind or node.op_type in _TYPE_SETTING_OPS:
                    continue
                if value.is_initializer():
                    if value not in converted:
                        converted[value] = _convert_initializer(graph, value, kind, names)
                    replacement = converted[value]
                else:
                    if (value, kind) not in casts:
                        casts[value, kind] = _insert_cast(graph, node, value, kind, names)
                    replacement = casts[value, kind]
                node.replace_input_with(position, replacement)
            if kind == self._kind:
                for value in node.outputs:
                    if _is_float(value):
                        value.dtype = kind
        for position, value in enumerate(graph.outputs):
            if value.dtype == self._kind:
                graph.outputs[position] = _append_float_cast(graph, value, names)
        RemoveUnusedNodesPass()(model)  # also removes the float32 originals of the weights
        return ir.passes.PassResult(model, modified=bool(converted or casts))

    def _is_convertible(self, node: ir.Node) -> bool:
        return (
            node.name not in self._keep
            and node.domain == ""
            and node.op_type not in _FP32_OPS | _TYPE_SETTING_OPS
            and (node.op_type == "QuantizeLinear" or any(_is_float(value) for value in node.outputs))
        )


_SUFFIX = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}


def _is_float(value: ir.Value) -> bool:
    return value.dtype in _SUFFIX


def _convert_initializer(graph: ir.Graph, value: ir.Value, kind: ir.DataType, names: Names) -> ir.Value:
    return add_initializer(graph, names.tensor(f"{value.name}_{_SUFFIX[kind]}"), array_of(value).astype(kind.numpy()))


def _insert_cast(graph: ir.Graph, reader: ir.Node, value: ir.Value, kind: ir.DataType, names: Names) -> ir.Value:
    """Cast `value` once for all its readers of type `kind`; `reader` is the first of them."""
    name = f"{value.name}_{_SUFFIX[kind]}"
    node = make_cast(value, kind, name=names.node(f"{name}_cast"), output=names.tensor(name))
    graph.insert_before(reader, node)
    return node.outputs[0]


def _append_float_cast(graph: ir.Graph, value: ir.Value, names: Names) -> ir.Value:
    """Cast a graph output to float32; the result takes over the output's name."""
    name = value.name
    assert value.dtype is not None
    value.name = names.tensor(f"{name}_{_SUFFIX[value.dtype]}")
    node = make_cast(value, ir.DataType.FLOAT, name=names.node(f"{name}_cast"), output=name)
    graph.append(node)
    return node.outputs[0]
