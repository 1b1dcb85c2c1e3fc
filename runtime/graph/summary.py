"""What an ONNX file says that an engine build must know: spec, input, precision."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import BackendUnavailable, ModelFileError
from runtime.graph.guard import check_nodes, check_tensors, external_files
from runtime.graph.wire import check_bytes
from runtime.spec import METADATA_KEY, ModelSpec
from runtime.system.files import sha256_file

__all__ = [
    "CALIBRATION_KEY",
    "WEIGHTED_OPS",
    "OnnxSummary",
    "node_macs",
    "read_onnx",
    "sha256_onnx",
    "summarize",
    "work_of",
]

CALIBRATION_KEY = "advprop.calibration"
"""Key of the calibration set's hash in an ONNX file's `metadata_props`."""

WEIGHTED_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that multiply by weights."""

_INT8 = "int8"
_NAMES = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxSummary:
    """The facts of one ONNX classifier."""

    sha256: str
    """Hash of the file; of one whose weights are beside it, of their hashes together."""
    size_bytes: int
    """Of the file, with its weights where they are beside it."""
    input_name: str
    """Name of the image input."""
    input_shape: tuple[int, ...]
    """(N, 3, H, W), or (N, H, W, 3) of pixels; -1 where the size is free."""
    outputs: tuple[str, ...]
    """Names of the logits or probabilities; of a `topk` file, of the probabilities and the classes."""
    spec: ModelSpec | None
    """The model's description, where advprop wrote the file."""
    calibration_sha256: str
    """Hash of the INT8 calibration set; empty where the file was not calibrated."""
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


def summarize(path: Path) -> OnnxSummary:
    """Reads the graph at `path`; weights kept outside the file are not loaded.

    Raises:
        ModelFileError: no such file, not ONNX, claims what it does not hold, or not one input and one output.
        BackendUnavailable: the `onnx` package is missing.
    """
    from concurrent.futures import ThreadPoolExecutor

    content = _content(path)
    with ThreadPoolExecutor(1) as pool:
        own_hash = pool.submit(lambda: hashlib.sha256(content).hexdigest())  # beside the parsing
        model = _parse(path, content)
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    spec = _spec(model, str(path))
    expected = 2 if spec is not None and spec.output_form == "topk" else 1
    if len(inputs) != 1 or len(graph.output) != expected:
        raise ModelFileError(
            f"{path} has {len(inputs)} inputs and {len(graph.output)} outputs, expected one image "
            "input and one logits output"
        )
    sizes = inputs[0].type.tensor_type.shape.dim
    beside = external_files(model, path)
    return OnnxSummary(
        sha256=_combined(own_hash.result(), beside),
        size_bytes=len(content) + sum(file.stat().st_size for file in beside),
        input_name=inputs[0].name,
        input_shape=tuple(max(size.dim_value, -1) if size.HasField("dim_value") else -1 for size in sizes),
        outputs=tuple(value.name for value in graph.output),
        spec=spec,
        calibration_sha256=_metadata(model, CALIBRATION_KEY),
        weights=_weights_by_type(graph, weights),
        ops=dict(Counter(node.op_type for node in graph.node)),
    )


def read_onnx(path: Path) -> Any:
    """Reads an ONNX file; weights kept outside it are not loaded.

    Raises:
        BackendUnavailable: the `onnx` package is missing.
        ModelFileError: no such file, not ONNX, or it claims what it does not hold.
    """
    return _parse(path, _content(path))


def _content(path: Path) -> bytes:
    """The bytes of a file that may be ONNX."""
    if not path.is_file():
        raise ModelFileError(f"no such ONNX file: {path}")
    try:
        check_bytes(path)
        return path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}") from error


def _parse(path: Path, content: bytes) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise BackendUnavailable(f"reading ONNX files needs the onnx package ({error}); pip install onnx") from error
    try:
        model = onnx.ModelProto.FromString(content)
    except Exception as error:  # protobuf's DecodeError has another name in each release
        raise ModelFileError(f"{path} is not an ONNX file, or is truncated: {error}") from error
    if not model.ir_version or not model.HasField("graph"):
        raise ModelFileError(f"{path} is not an ONNX file: it has no graph, or no version")
    check_nodes(model, path)
    check_tensors(model, path)
    return model


def sha256_onnx(path: Path) -> str:
    """Returns the hash that `summarize` gives, without the rest.

    Raises:
        ModelFileError: as `summarize`.
    """
    content = _content(path)
    return _combined(hashlib.sha256(content).hexdigest(), external_files(_parse(path, content), path))


def work_of(path: Path) -> tuple[dict[str, int], int]:
    """Measures what one image costs; apart from `summarize`, since it infers all shapes.

    Returns:
        Float nodes by the type of what they give (`fp32`, `fp16`, `bf16`), and the multiply-accumulates of
        convolutions and matrix products, at the spec's size where the graph leaves it open; 0 where
        shapes are unknown.

    Raises:
        ModelFileError: as `summarize`.
    """
    model = read_onnx(path)
    return _nodes_by_type(model), sum(node_macs(model).values())


def _metadata(model: Any, key: str) -> str:
    return next((entry.value for entry in model.metadata_props if entry.key == key), "")


def _spec(model: Any, where: str) -> ModelSpec | None:
    text = _metadata(model, METADATA_KEY)
    return ModelSpec.from_json(text, where=where) if text else None


def _combined(own: str, beside: list[Path]) -> str:
    """The file's own hash, or of one whose weights are beside it, the hash of all hashes."""
    hashes = [own, *(sha256_file(file) for file in beside)]
    return own if not beside else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _nodes_by_type(model: Any) -> dict[str, int]:
    import onnx

    graph = model.graph
    try:
        inferred = onnx.shape_inference.infer_shapes(model).graph
    except onnx.shape_inference.InferenceError:
        inferred = graph
    names = {onnx.TensorProto.DataType.Value(key): name for key, name in _NAMES.items()}
    kinds = {
        value.name: names.get(value.type.tensor_type.elem_type) for value in (*inferred.value_info, *inferred.output)
    }
    found = [kinds.get(node.output[0]) for node in graph.node if node.output]
    return dict(Counter(kind for kind in found if kind is not None))


def node_macs(model: Any) -> dict[str, int]:
    """Returns the multiply-accumulates of each convolution and matrix product for one image.

    Args:
        model: an `onnx.ModelProto`, with unique node names; an open image size is that of its spec.

    Returns:
        Node name → MACs, in order; empty where shapes are unknown.
    """
    import onnx

    spec = _spec(model, "the model file")
    weights = {tensor.name for tensor in model.graph.initializer}
    input_name = next(value.name for value in model.graph.input if value.name not in weights)

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    del fixed.graph.value_info[:]
    for value in fixed.graph.input:
        if value.name == input_name:
            _fix_sizes(value.type.tensor_type.shape.dim, spec)
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(fixed).graph
    except (onnx.shape_inference.InferenceError, ValueError):  # ValueError: too large for protobuf
        return {}
    shapes = {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    } | {tensor.name: list(tensor.dims) for tensor in inferred.initializer}
    macs: dict[str, int] = {}
    for number, node in enumerate(inferred.node):
        if node.op_type not in WEIGHTED_OPS:
            continue
        data, weight, output = (shapes.get(name, []) for name in (*node.input[:2], node.output[0]))
        if not (data and weight and output) or 0 in data + weight + output:
            return {}
        if node.op_type == "ConvTranspose":  # weight: (in, out / groups, kernel…)
            count = math.prod(data) * math.prod(weight[1:])
        elif node.op_type == "Conv":  # weight: (out, in / groups, kernel…)
            count = math.prod(output) * math.prod(weight[1:])
        else:
            transposed = any(item.name == "transA" and item.i for item in node.attribute)
            count = math.prod(output) * data[-2 if transposed else -1]
        macs[node.name or f"{node.op_type}_{number}"] = count
    return macs


def _fix_sizes(dims: Any, spec: ModelSpec | None) -> None:
    """One image, of the spec's size where the graph leaves it open."""
    if not dims:
        return
    dims[0].dim_value = 1
    opened = [size for size in dims[1:] if not size.HasField("dim_value")]
    if spec is not None and len(opened) == 2:
        opened[0].dim_value, opened[1].dim_value = spec.preprocessing.height, spec.preprocessing.width


def _weights_by_type(graph: Any, initializers: dict[str, Any]) -> dict[str, int]:
    from onnx import TensorProto

    names = {TensorProto.DataType.Value(key): name for key, name in _NAMES.items()} | {TensorProto.INT8: _INT8}
    producers = {output: node for node in graph.node for output in node.output}
    counts: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type not in WEIGHTED_OPS:
            continue
        name = node.input[1]
        producer = producers.get(name)
        target = None
        passed: set[str] = set()  # a hostile graph may be a ring
        while producer is not None and producer.op_type in ("Cast", "DequantizeLinear") and name not in passed:
            passed.add(name)
            if producer.op_type == "Cast" and target is None:
                target = next((item.i for item in producer.attribute if item.name == "to"), None)
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
