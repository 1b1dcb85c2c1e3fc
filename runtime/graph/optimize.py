"""Fold constants and BatchNorms with ONNX Runtime's basic optimizations."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx

from runtime.errors import ModelFileError, first_line
from runtime.graph.model import LIMIT_BYTES, is_large, session_of

__all__ = ["optimize"]

_LOG_ERRORS_ONLY = 3


def optimize(model: onnx.ModelProto, limit: int = LIMIT_BYTES) -> onnx.ModelProto:
    """Return an equivalent graph of standard operators, with BatchNorms and constants folded.

    Raises:
        ModelFileError: ONNX Runtime cannot run the model.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = _LOG_ERRORS_ONLY
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        if is_large(model, limit):
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        try:
            session_of(model, options, limit)
        except Exception as error:  # ONNX Runtime's exceptions have no other common base
            raise ModelFileError(f"ONNX Runtime cannot run the graph: {first_line(error)}") from error
        return onnx.load(options.optimized_model_filepath)
