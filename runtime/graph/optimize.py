"""Fold constants and BatchNorms with ONNX Runtime's basic optimizations."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from runtime.errors import ModelFileError, first_line
from runtime.graph.model import LIMIT_BYTES, is_large, join_weights, session_of, tensor_bytes

__all__ = ["open_quietly", "optimize"]

_LOG_FATAL_ONLY = 4


def open_quietly(model: onnx.ModelProto) -> Any:
    """Return an InferenceSession for a graph that may not run; ONNX Runtime logs no errors."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = _LOG_FATAL_ONLY
    return session_of(model, options)


def optimize(
    model: onnx.ModelProto, weights: Mapping[str, onnx.TensorProto] | None = None, limit: int = LIMIT_BYTES
) -> onnx.ModelProto:
    """Return an equivalent graph of standard operators, with BatchNorms and constants folded.

    Args:
        model: not changed.
        weights: the weights that `split_weights` took out of it.
        limit: see `is_large`.

    Raises:
        ModelFileError: ONNX Runtime cannot run the model.
    """
    import onnxruntime as ort

    weights = weights or {}
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = _LOG_FATAL_ONLY
    large = is_large(model, limit) or sum(tensor_bytes(tensor) for tensor in weights.values()) > limit
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        if large:
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        try:
            if large:
                session_of(model, options, limit, weights)
            else:
                session_of(join_weights(model, weights), options)
        except Exception as error:  # ONNX Runtime's exceptions have no other common base
            raise ModelFileError(f"ONNX Runtime cannot run the graph: {first_line(error)}") from error
        optimized = onnx.load(options.optimized_model_filepath)
    used = {node.domain for node in optimized.graph.node} | {""}
    # ONNX Runtime imports every domain that it knows.
    versions = [(entry.domain, entry.version) for entry in optimized.opset_import if entry.domain in used]
    del optimized.opset_import[:]
    optimized.opset_import.extend(helper.make_opsetid(*version) for version in versions)
    return optimized
