"""FP32 graph → FP16 graph, except where measured ranges say that FP16 would overflow.

Precision lives in the graph: TensorRT 11 and TensorRT-RTX have no FP16 flag, and the same
file then runs on every backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, numpy_helper
from onnx_ir.passes.common import TopologicalSortPass
from onnxruntime.transformers.float16 import convert_float_to_float16

__all__ = ["Decision", "to_fp16"]

LIMIT = float(np.finfo(np.float16).max) / 2
"""Tensors above this on the measured images stay in FP32: half of FP16's 65504, since
other images reach further than the measured ones."""


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
    ranges = dict(amax)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor)
            ranges[tensor.name] = float(np.abs(array).max()) if array.size else 0.0
    decisions = []
    for node in model.graph.node:
        tensors = [name for name in (*node.input, *node.output) if name in ranges]
        worst = max(tensors, key=lambda name: _rank(ranges[name]), default=None)
        if worst is not None and not ranges[worst] <= LIMIT:
            decisions.append(Decision(node=node.name, op=node.op_type, tensor=worst, amax=ranges[worst]))
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    converted = convert_float_to_float16(
        copy, keep_io_types=True, node_block_list=[decision.node for decision in decisions]
    )
    graph = ir.from_proto(converted)
    TopologicalSortPass()(graph)  # the converter appends its casts at the end
    sorted_model = ir.to_proto(graph)
    onnx.checker.check_model(sorted_model, full_check=True)
    return sorted_model, decisions


def _rank(value: float) -> float:
    return float("inf") if np.isnan(value) else value
