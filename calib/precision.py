"""FP32 graph → FP16 or BF16 graph, except where that would overflow or lose too much.

Precision lives in the graph: TensorRT 11 and TensorRT-RTX have no FP16 flag, and the same
file then runs on every backend.

ONNX Runtime's own converter takes a list of nodes to keep in FP32, but rounds every tensor
between two of them to FP16, so a tensor that overflows still does. Here a tensor has the
type of the node that makes it, and is cast only where a node of the other type reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from runtime.graph.compare import TensorError
from runtime.graph.edit import add_initializer
from runtime.graph.model import check

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
"""The types a float32 graph can be converted to, by name."""

LIMIT = float(np.finfo(np.float16).max) / 2
"""Tensors above this on the measured images stay in FP32: half of FP16's 65504, since
other images reach further than the measured ones."""

_BF16_OPSET = 22
"""The first whose convolutions may be BF16. Of the operators here, nothing else changed since 20."""

_FP32_OPS = frozenset({"Resize", "Upsample", "CumSum", "RandomNormalLike", "RandomUniformLike", "Range"})
"""Operators that have no FP16 form in ONNX or TensorRT, or float32 inputs by definition."""
_TYPE_MAKERS = frozenset({"Cast", "CastLike", "Constant", "ConstantOfShape"})
"""Operators whose output type is not that of their inputs: left as they are."""
_AT_MOST_ONE = frozenset({"HardSigmoid", "Sigmoid", "Softmax", "Tanh"})
_NO_LARGER = _AT_MOST_ONE | {
    *("AveragePool", "Flatten", "GlobalAveragePool", "GlobalMaxPool", "Identity", "MaxPool", "ReduceMax"),
    *("ReduceMean", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
}
"""Operators whose output reaches no further than their inputs, or than 1."""
_CLIPPING = frozenset({"Clip", "Relu"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Why a node stays in FP32."""

    node: str
    """Name of the node."""
    op: str
    """Its operator."""
    reason: str
    """`overflow`: a tensor passes LIMIT. `loss`: the node, or a reader of it, loses more than others do."""
    tensor: str
    """The tensor that decided."""
    amax: float
    """Its largest magnitude on the measured images."""
    error: float = 0.0
    """Of `loss`: its error in the reduced precision, as a share of its largest magnitude."""


def deciding_tensors(model: onnx.ModelProto) -> set[str]:
    """Returns the tensors whose ranges tell whether any other may pass LIMIT: about a third of all."""
    nodes = model.graph.node
    producers = {name: node for node in nodes for name in node.output}
    readers: dict[str, list[str]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    tensors = {value.name for value in model.graph.input}
    for node in nodes:
        gate = node.op_type == "Mul" and any(
            name in producers and producers[name].op_type in _AT_MOST_ONE for name in node.input
        )
        if node.op_type in _CLIPPING or not (gate or node.op_type in _NO_LARGER):
            tensors |= set(node.output)
    # Behind a lone Relu only what it lets pass matters: what overflows below zero is zero after it.
    return {name for name in tensors if not (len(set(readers.get(name, ()))) == 1 and readers[name][0] in _CLIPPING)}


def overflows(model: onnx.ModelProto, amax: Mapping[str, float]) -> list[Decision]:
    """Names the nodes that read or write a tensor beyond LIMIT, or one that is not finite.

    Args:
        model: a float32 graph.
        amax: largest magnitudes of all tensors. Those of the deciding ones alone tell whether there
            are any such nodes, but not all of them.
    """
    graph = ir.from_proto(model).graph
    ranges = {name: value if np.isfinite(value) else float("inf") for name, value in amax.items()}
    for name, value in graph.initializers.items():
        if value.dtype == ir.DataType.FLOAT and value.const_value is not None:
            array = value.const_value.numpy()
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
    """Names the `count` nodes that add most error, and those that make what they read.

    A difference of two large numbers is lost when they are rounded, not when it is taken.

    Args:
        model: the float32 graph.
        errors: of its tensors in the reduced precision; see `runtime.graph.compare.graph_errors`.
        amax: largest magnitudes, for the record.
        count: nodes to choose by their own error.
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
    """Converts a float32 graph to FP16 or BF16 with float32 input and output.

    Args:
        model: not changed.
        precision: a key of REDUCED.
        keep: what stays in FP32.
    """
    graph_model = ir.from_proto(model)
    ToReduced(REDUCED[precision], keep=[decision.node for decision in keep])(graph_model)
    if precision == "bf16":
        graph_model.graph.opset_imports[""] = _BF16_OPSET
    converted = ir.to_proto(graph_model)
    check(converted)
    return converted


class ToReduced(ir.passes.InPlacePass):
    """Makes every node compute in a reduced precision that can and need not be kept; graph ends stay float32."""

    def __init__(self, kind: ir.DataType = ir.DataType.FLOAT16, keep: Iterable[str] = ()) -> None:
        """Converts to `kind`, FLOAT16 or BFLOAT16; keeps the nodes named in `keep` in FP32."""
        super().__init__()
        self._kind = kind
        self._keep = frozenset(keep)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        narrowed: dict[ir.Value, ir.Value] = {}
        for node in list(graph):
            kind = self._kind if self._convertible(node) else ir.DataType.FLOAT
            for position, value in enumerate(node.inputs):
                if value is None or not _is_float(value) or value.dtype == kind or node.op_type in _TYPE_MAKERS:
                    continue
                if value.is_initializer():
                    replacement = narrowed.get(value) or narrowed.setdefault(value, _narrow(graph, value, kind))
                else:
                    replacement = casts.get((value, kind)) or casts.setdefault(
                        (value, kind), _cast(graph, node, value, kind)
                    )
                node.replace_input_with(position, replacement)
            if kind == self._kind:
                for value in node.outputs:
                    if _is_float(value):
                        value.dtype = kind
        for position, value in enumerate(graph.outputs):
            if value.dtype == self._kind:
                graph.outputs[position] = _float_output(graph, value)
        RemoveUnusedNodesPass()(model)  # and with them the float32 originals of weights
        return ir.passes.PassResult(model, modified=bool(narrowed or casts))

    def _convertible(self, node: ir.Node) -> bool:
        """Float nodes, except the kept ones and those that have none."""
        return (
            node.name not in self._keep
            and node.domain == ""
            and node.op_type not in _FP32_OPS | _TYPE_MAKERS
            and (node.op_type == "QuantizeLinear" or any(_is_float(value) for value in node.outputs))
        )


_SUFFIX = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}


def _is_float(value: ir.Value) -> bool:
    return value.dtype in _SUFFIX


def _narrow(graph: ir.Graph, value: ir.Value, kind: ir.DataType) -> ir.Value:
    assert value.const_value is not None
    return add_initializer(graph, f"{value.name}_{_SUFFIX[kind]}", value.const_value.numpy().astype(kind.numpy()))


def _cast(graph: ir.Graph, reader: ir.Node, value: ir.Value, kind: ir.DataType) -> ir.Value:
    """Casts `value` once for all its readers of the other type, `reader` being the first."""
    name = f"{value.name}_{_SUFFIX[kind]}"
    node = ir.node("Cast", [value], {"to": int(kind)}, name=f"{name}_cast")
    output = node.outputs[0]
    output.name, output.type, output.shape = name, ir.TensorType(kind), value.shape
    graph.insert_before(reader, node)
    return output


def _float_output(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """A float32 copy of a graph output that takes over its name."""
    name = value.name
    assert value.dtype is not None
    value.name = f"{name}_{_SUFFIX[value.dtype]}"
    node = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=f"{name}_cast")
    output = node.outputs[0]
    output.name, output.type, output.shape = name, ir.TensorType(ir.DataType.FLOAT), value.shape
    graph.append(node)
    return output
