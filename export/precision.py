"""FP32 graph → FP16 graph, except where measured ranges say that FP16 would overflow.

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

from export.initializers import add_initializer

__all__ = ["LIMIT", "Decision", "ToFloat16", "to_fp16"]

LIMIT = float(np.finfo(np.float16).max) / 2
"""Tensors above this on the measured images stay in FP32: half of FP16's 65504, since
other images reach further than the measured ones."""

_FP32_OPS = frozenset({"Resize", "Upsample", "CumSum", "RandomNormalLike", "RandomUniformLike", "Range"})
"""Operators that have no FP16 form in ONNX or TensorRT, or float32 inputs by definition."""
_TYPE_MAKERS = frozenset({"Cast", "CastLike", "Constant", "ConstantOfShape"})
"""Operators whose output type is not that of their inputs: left as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Why a node stays in FP32."""

    node: str
    """Name of the node."""
    op: str
    """Its operator."""
    tensor: str
    """The tensor that decided."""
    amax: float
    """Its largest magnitude on the measured images."""


def to_fp16(model: onnx.ModelProto, amax: Mapping[str, float]) -> tuple[onnx.ModelProto, list[Decision]]:
    """Converts a float32 graph to FP16 with float32 input and output.

    Args:
        model: not changed.
        amax: largest magnitude of each tensor, from `calib.collect_amax`.

    Returns:
        The FP16 graph, and the nodes that stay in FP32 because a tensor they read or
        write passes LIMIT (or is not finite).
    """
    graph_model = ir.from_proto(model)
    decisions = _decide(graph_model.graph, amax)
    ToFloat16(keep=[decision.node for decision in decisions])(graph_model)
    converted = ir.to_proto(graph_model)
    onnx.checker.check_model(converted, full_check=True)
    return converted, decisions


def _decide(graph: ir.Graph, amax: Mapping[str, float]) -> list[Decision]:
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
            decisions.append(Decision(node=node.name or "", op=node.op_type, tensor=worst, amax=ranges[worst]))
    return decisions


class ToFloat16(ir.passes.InPlacePass):
    """Makes every node compute in FP16 that can and need not be kept; graph ends stay float32."""

    def __init__(self, keep: Iterable[str] = ()) -> None:
        """Keeps the nodes named in `keep` in FP32."""
        super().__init__()
        self._keep = frozenset(keep)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        halves: dict[ir.Value, ir.Value] = {}
        for node in list(graph):
            kind = ir.DataType.FLOAT16 if self._convertible(node) else ir.DataType.FLOAT
            for position, value in enumerate(node.inputs):
                if value is None or not _is_float(value) or value.dtype == kind or node.op_type in _TYPE_MAKERS:
                    continue
                if value.is_initializer():
                    replacement = halves.get(value) or halves.setdefault(value, _half_initializer(graph, value))
                else:
                    replacement = casts.get((value, kind)) or casts.setdefault(
                        (value, kind), _cast(graph, node, value, kind)
                    )
                node.replace_input_with(position, replacement)
            if kind == ir.DataType.FLOAT16:
                for value in node.outputs:
                    if _is_float(value):
                        value.dtype = kind
        for position, value in enumerate(graph.outputs):
            if value.dtype == ir.DataType.FLOAT16:
                graph.outputs[position] = _float_output(graph, value)
        RemoveUnusedNodesPass()(model)  # and with them the float32 originals of weights
        return ir.passes.PassResult(model, modified=bool(halves or casts))

    def _convertible(self, node: ir.Node) -> bool:
        """Float nodes, except the kept ones and those that have no FP16 form."""
        return (
            node.name not in self._keep
            and node.domain == ""
            and node.op_type not in _FP32_OPS | _TYPE_MAKERS
            and any(_is_float(value) for value in node.outputs)
        )


def _is_float(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def _half_initializer(graph: ir.Graph, value: ir.Value) -> ir.Value:
    assert value.const_value is not None
    return add_initializer(graph, f"{value.name}_fp16", value.const_value.numpy().astype(np.float16))


def _cast(graph: ir.Graph, reader: ir.Node, value: ir.Value, kind: ir.DataType) -> ir.Value:
    """Casts `value` once for all its readers of the other type, `reader` being the first."""
    name = f"{value.name}_{'fp16' if kind == ir.DataType.FLOAT16 else 'fp32'}"
    node = ir.node("Cast", [value], {"to": int(kind)}, name=f"{name}_cast")
    output = node.outputs[0]
    output.name, output.type, output.shape = name, ir.TensorType(kind), value.shape
    graph.insert_before(reader, node)
    return output


def _float_output(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """A float32 copy of a graph output that takes over its name."""
    name = value.name
    value.name = f"{name}_fp16"
    node = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=f"{name}_cast")
    output = node.outputs[0]
    output.name, output.type, output.shape = name, ir.TensorType(ir.DataType.FLOAT), value.shape
    graph.append(node)
    return output
