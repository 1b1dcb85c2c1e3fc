"""What an ONNX file says that an engine build must know: spec, input, precision."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import BackendUnavailable, ModelFileError
from runtime.spec import METADATA_KEY, ModelSpec

__all__ = ["OnnxSummary", "summarise"]

_WEIGHTED_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_INT8 = "int8"


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxSummary:
    """The facts of one ONNX classifier."""

    input_name: str
    """Name of the image input."""
    input_shape: tuple[int, ...]
    """(N, 3, H, W), or (N, H, W, 3) of pixels; -1 where the size is free."""
    output_name: str
    """Name of the logits or probabilities."""
    spec: ModelSpec | None
    """The model's description, where advprop wrote the file."""
    weights: dict[str, int]
    """Weight elements of convolutions and matrix products by the type they are computed
    in: `fp32`, `fp16`, `bf16`, `int8`."""
    ops: dict[str, int]
    """Nodes by operator."""

    @property
    def precision(self) -> str:
        """The type that most weight elements are computed in; `fp32` where there is none."""
        return max(self.weights, key=lambda name: self.weights[name]) if self.weights else "fp32"

    @property
    def shares(self) -> dict[str, float]:
        """Fraction of the weight elements by the type they are computed in, the largest first."""
        by_size = sorted(self.weights, key=lambda name: -self.weights[name])
        return {name: self.share(name) for name in by_size}

    def share(self, precision: str) -> float:
        """Fraction of the weight elements computed in `precision`, 0 to 1."""
        total = sum(self.weights.values())
        return self.weights.get(precision, 0) / total if total else 0.0


def summarise(path: Path) -> OnnxSummary:
    """Reads the graph at `path`; weights kept outside the file are not loaded.

    Raises:
        ModelFileError: no such file, not ONNX, or not one input and one output.
        BackendUnavailable: the `onnx` package is missing.
    """
    try:
        import onnx
    except ImportError as error:
        raise BackendUnavailable(f"reading ONNX files needs the onnx package ({error}); pip install onnx") from error
    if not path.is_file():
        raise ModelFileError(f"no such ONNX file: {path}")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has another name in each release
        raise ModelFileError(f"{path} is not an ONNX file, or is truncated: {error}") from error
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise ModelFileError(
            f"{path} has {len(inputs)} inputs and {len(graph.output)} outputs, expected one image "
            "input and one logits output"
        )
    text = next((entry.value for entry in model.metadata_props if entry.key == METADATA_KEY), None)
    sizes = inputs[0].type.tensor_type.shape.dim
    return OnnxSummary(
        input_name=inputs[0].name,
        input_shape=tuple(size.dim_value if size.HasField("dim_value") else -1 for size in sizes),
        output_name=graph.output[0].name,
        spec=ModelSpec.from_json(text, where=str(path)) if text else None,
        weights=_weights_by_type(graph, weights),
        ops=dict(Counter(node.op_type for node in graph.node)),
    )


def _weights_by_type(graph: Any, initializers: dict[str, Any]) -> dict[str, int]:
    from onnx import TensorProto

    names = {
        TensorProto.FLOAT: "fp32",
        TensorProto.FLOAT16: "fp16",
        TensorProto.BFLOAT16: "bf16",
        TensorProto.INT8: _INT8,
    }
    producers = {output: node for node in graph.node for output in node.output}
    counts: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type not in _WEIGHTED_OPS:
            continue
        name = node.input[1]
        producer = producers.get(name)
        target = None
        while producer is not None and producer.op_type in ("Cast", "DequantizeLinear"):
            if producer.op_type == "Cast" and target is None:
                target = next(item.i for item in producer.attribute if item.name == "to")
            name = producer.input[0]
            producer = producers.get(name)
        tensor = initializers.get(name)
        if tensor is None:
            continue
        elements = 1
        for size in tensor.dims:
            elements *= size
        stored = tensor.data_type
        computed = stored if stored == TensorProto.INT8 or target is None else target
        counts[names.get(computed, "other")] += elements
    return dict(counts)
