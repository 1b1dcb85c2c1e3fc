"""Summarize an ONNX classifier: spec, input, precision of its layers, and work per image."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import ModelFileError
from runtime.graph.engine_form import unreadable_parts
from runtime.graph.read import read_onnx, read_onnx_file
from runtime.graph.structure import (
    WEIGHTED_OPS,
    graph_inputs,
    initializers_of,
    int_attribute,
    metadata,
    node_macs,
    shape_of,
    spec_of,
)
from runtime.spec import ModelSpec

__all__ = ["ADAPTATION_KEY", "CALIBRATION_KEY", "OnnxSummary", "summarize", "work_of"]

CALIBRATION_KEY = "advprop.calibration"
"""Key of the calibration set's hash in an ONNX file's `metadata_props`."""

ADAPTATION_KEY = "advprop.adaptation"
"""Key of the record of an adaptation in an ONNX file's `metadata_props`, see `runtime.adapt`."""

_INT8 = "int8"
_PRECISIONS = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxSummary:
    """The facts of one ONNX classifier."""

    sha256: str
    """Hash of the file; if weights are stored externally, of all files."""
    size_bytes: int
    """Size of the file, external weights included."""
    input_name: str
    """Name of the image input."""
    input_shape: tuple[int, ...]
    """(N, 3, H, W), or (N, H, W, 3) for pixels; -1 for an open size."""
    outputs: tuple[str, ...]
    """Names of the outputs: logits or probabilities; for the form `topk`, probabilities and
    classes."""
    spec: ModelSpec | None
    """The model's description; None if advprop did not write the file."""
    calibration_sha256: str
    """Hash of the INT8 calibration set; empty if the model is not calibrated."""
    adaptation: str
    """JSON record of the adaptation to field images; empty if the model is not adapted."""
    weights: dict[str, int]
    """Number of weights of convolutions and matrix products by the precision they are computed
    in: `fp32`, `fp16`, `bf16` or `int8`."""
    ops: dict[str, int]
    """Number of nodes by operator."""
    engine_problems: tuple[str, ...]
    """Why TensorRT cannot build an engine from the file's quantization, one line per kind."""

    @property
    def precision(self) -> str:
        """Precision in which most weights are computed; `fp32` if the model has no weights."""
        return max(self.weights, key=lambda name: self.weights[name]) if self.weights else "fp32"

    @property
    def shares(self) -> dict[str, float]:
        """Share of the weights by precision, 0 to 1, largest first."""
        by_size = sorted(self.weights, key=lambda name: -self.weights[name])
        return {name: self.share(name) for name in by_size}

    def share(self, precision: str) -> float:
        """Return the share of the weights that are computed in `precision`, 0 to 1."""
        total = sum(self.weights.values())
        return self.weights.get(precision, 0) / total if total else 0.0


def summarize(path: Path) -> OnnxSummary:
    """Summarize the ONNX file at `path`; external weights are not loaded.

    Raises:
        BackendUnavailable: the `onnx` package is missing.
        ModelFileError: the file does not exist, is not ONNX, lacks data that it declares, or does
            not have exactly one input and one output (two outputs for the form `topk`).
        SpecError: the spec in the file is not valid.
    """
    file = read_onnx_file(path)
    graph = file.model.graph
    inputs = graph_inputs(graph)
    spec = spec_of(file.model, str(path))
    expected = 2 if spec is not None and spec.output_form == "topk" else 1
    if len(inputs) != 1 or len(graph.output) != expected:
        names = ", ".join(value.name for value in inputs), ", ".join(value.name for value in graph.output)
        raise ModelFileError(
            f"{path} has {len(inputs)} inputs ({names[0]}) and {len(graph.output)} outputs ({names[1]}); expected one "
            "image input and one output with logits or probabilities",
            fix="choose the output with advprop convert --output NAME" if len(inputs) == 1 else "",
        )
    return OnnxSummary(
        sha256=file.sha256,
        size_bytes=file.size_bytes,
        input_name=inputs[0].name,
        input_shape=shape_of(inputs[0].type.tensor_type),
        outputs=tuple(value.name for value in graph.output),
        spec=spec,
        calibration_sha256=metadata(file.model, CALIBRATION_KEY),
        adaptation=metadata(file.model, ADAPTATION_KEY),
        weights=_weights_by_precision(graph),
        ops=dict(Counter(node.op_type for node in graph.node)),
        engine_problems=tuple(unreadable_parts(file.model)),
    )


def work_of(path: Path) -> tuple[dict[str, int], int]:
    """Return the work per image. Slower than `summarize`: it infers all shapes.

    Returns:
        Number of float nodes by output precision (`fp32`, `fp16`, `bf16`), and the
        multiply-accumulates of all convolutions and matrix products. An open image size counts as
        the spec's size. The MACs are 0 if a shape is unknown.

    Raises:
        BackendUnavailable, ModelFileError: see `read_onnx`.
    """
    model = read_onnx(path)
    macs = node_macs(model)
    layers = sum(node.op_type in WEIGHTED_OPS for node in model.graph.node)
    return _nodes_by_precision(model), sum(macs.values()) if len(macs) == layers else 0


def _nodes_by_precision(model: Any) -> dict[str, int]:
    import onnx

    graph = model.graph
    try:
        inferred = onnx.shape_inference.infer_shapes(model).graph
    except onnx.shape_inference.InferenceError:
        inferred = graph
    names = {onnx.TensorProto.DataType.Value(key): name for key, name in _PRECISIONS.items()}
    precisions = {
        value.name: names.get(value.type.tensor_type.elem_type) for value in (*inferred.value_info, *inferred.output)
    }
    found = [precisions.get(node.output[0]) for node in graph.node if node.output]
    return dict(Counter(name for name in found if name is not None))


def _weights_by_precision(graph: Any) -> dict[str, int]:
    from onnx import TensorProto

    names = {TensorProto.DataType.Value(key): name for key, name in _PRECISIONS.items()} | {TensorProto.INT8: _INT8}
    producers = {output: node for node in graph.node for output in node.output}
    initializers = initializers_of(graph)
    counts: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type not in WEIGHTED_OPS:
            continue
        name, cast_to = _stored_weight(node.input[1], producers)
        tensor = initializers.get(name)
        if tensor is None:
            continue
        computed = tensor.data_type if tensor.data_type == TensorProto.INT8 or cast_to is None else cast_to
        counts[names.get(computed, "other")] += math.prod(tensor.dims)
    return dict(counts)


def _stored_weight(name: str, producers: dict[str, Any]) -> tuple[str, int | None]:
    """Return the tensor behind a weight's Cast and DequantizeLinear nodes, and its last type."""
    cast_to: int | None = None
    visited: set[str] = set()  # the nodes of a malicious graph can form a cycle
    producer = producers.get(name)
    while producer is not None and producer.op_type in ("Cast", "DequantizeLinear") and name not in visited:
        visited.add(name)
        if producer.op_type == "Cast" and cast_to is None:
            cast_to = int_attribute(producer, "to", 0) or None
        name = producer.input[0]
        producer = producers.get(name)
    return name, cast_to
