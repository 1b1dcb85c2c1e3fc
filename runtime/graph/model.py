"""Check, run and save ONNX models of any size that are held in memory.

Protobuf serializes at most 2 GiB. The checker and shape inference therefore see a larger model
without its weights, and ONNX Runtime receives the weights separately.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from runtime.system.files import atomic_folder, write_bytes

__all__ = [
    "LIMIT_BYTES",
    "MIN_OPSET",
    "OPSET",
    "check",
    "first_output",
    "infer_shapes",
    "is_large",
    "join_weights",
    "open_session",
    "run_batches",
    "save_onnx",
    "session_of",
    "split_weights",
    "tensor_bytes",
    "tensor_types",
    "with_outputs",
    "without_weights",
]

LIMIT_BYTES = 2**31 - 2**26
"""Weights up to this size are serialized with the model: protobuf's 2 GiB minus 64 MiB for the
graph."""

MIN_OPSET = 19
"""Oldest opset in which the scales of QuantizeLinear can be FP16."""
OPSET = 20
"""Opset of the models that advprop writes. ONNX Runtime's INT8 tools fail from 21 on."""

_MAX_SHAPE_BYTES = 1024
"""Initializers up to this size stay in the model, because shape inference reads the values of some
of them."""

_MAX_SPLIT_ELEMENTS = 2**18
"""Initializers with more elements are not copied while a graph is rewritten."""


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Return the size of a tensor's values, of at least 8 bits each."""
    elements: int = math.prod(tensor.dims)
    return elements * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def is_large(model: onnx.ModelProto, limit: int = LIMIT_BYTES) -> bool:
    """Return whether the weights have more than `limit` bytes."""
    in_memory = (tensor for tensor in model.graph.initializer if tensor.data_location != TensorProto.EXTERNAL)
    return sum(tensor_bytes(tensor) for tensor in in_memory) > limit


def infer_shapes(model: onnx.ModelProto, limit: int = LIMIT_BYTES) -> onnx.GraphProto:
    """Return the graph with inferred types and shapes; large models are stripped of weights."""
    return onnx.shape_inference.infer_shapes(without_weights(model) if is_large(model, limit) else model).graph


def tensor_types(model: onnx.ModelProto, limit: int = LIMIT_BYTES) -> dict[str, onnx.TypeProto.Tensor]:
    """Return the type and shape of all tensors of known type, by name."""
    graph = infer_shapes(model, limit)
    return {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.input, *graph.output)}


def with_outputs(
    model: onnx.ModelProto, names: Iterable[str], kinds: Mapping[str, int] | None = None
) -> onnx.ModelProto:
    """Return a copy of the model with additional outputs.

    Args:
        model: not changed.
        names: tensors to output; existing outputs are unchanged.
        kinds: ONNX element type of each tensor that is not float32.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    known = {value.name for value in probe.graph.output}
    for name in dict.fromkeys(names):
        if name not in known:
            kind = (kinds or {}).get(name, TensorProto.FLOAT)
            probe.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    return probe


def check(model: onnx.ModelProto, limit: int = LIMIT_BYTES) -> None:
    """Run ONNX's checker and its strict shape inference.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: the model is not valid.
    """
    onnx.checker.check_model(without_weights(model) if is_large(model, limit) else model, full_check=True)


def open_session(model: onnx.ModelProto, limit: int = LIMIT_BYTES) -> Any:
    """Return an InferenceSession on the CPU that computes Q/DQ nodes exactly as written."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    # The INT8 kernels that ONNX Runtime would fuse Q/DQ pairs into saturate on CPUs without VNNI.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return session_of(model, options, limit)


def session_of(
    model: onnx.ModelProto,
    options: Any,
    limit: int = LIMIT_BYTES,
    weights: Mapping[str, onnx.TensorProto] | None = None,
) -> Any:
    """Return an InferenceSession on the CPU.

    Args:
        model: the model.
        options: the `onnxruntime.SessionOptions`.
        limit: see `is_large`.
        weights: the weights that `split_weights` took out of the model.
    """
    import onnxruntime as ort

    weights = weights or {}
    if not weights and not is_large(model, limit):
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    light = _without_initializers(model)
    names, values = [], []
    for tensor in model.graph.initializer:
        if not _is_weight(tensor):
            light.graph.initializer.append(tensor)
            continue
        reference = light.graph.initializer.add(
            name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=TensorProto.EXTERNAL
        )
        array = numpy_helper.to_array(weights.get(tensor.name, tensor))
        for key, value in (("location", "in memory"), ("offset", "0"), ("length", str(array.nbytes))):
            reference.external_data.add(key=key, value=value)
        names.append(tensor.name)
        values.append(ort.OrtValue.ortvalue_from_numpy(array))
    options.add_external_initializers(names, values)
    return ort.InferenceSession(light.SerializeToString(), options, providers=["CPUExecutionProvider"])


def split_weights(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, onnx.TensorProto]]:
    """Return a copy of the model whose largest initializers have no data, and these by name.

    Rewriting the copy is cheap. The weights belong to `model` and are not copied.
    """
    light = _without_initializers(model)
    weights = {}
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) > _MAX_SPLIT_ELEMENTS:
            light.graph.initializer.add(
                name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=TensorProto.EXTERNAL
            )
            weights[tensor.name] = tensor
        else:
            light.graph.initializer.append(tensor)
    return light, weights


def join_weights(model: onnx.ModelProto, weights: Mapping[str, onnx.TensorProto]) -> onnx.ModelProto:
    """Return a copy of a model from `split_weights` with its weights."""
    full = onnx.ModelProto()
    full.CopyFrom(model)
    for tensor in full.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(weights[tensor.name])
    return full


def first_output(session: Any, batch: NDArray[Any]) -> NDArray[Any]:
    """Run a session of one input on `batch` and return its first output."""
    output: NDArray[Any] = session.run([session.get_outputs()[0].name], {session.get_inputs()[0].name: batch})[0]
    return output


def run_batches(model: onnx.ModelProto, batches: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """Run the model on the CPU and return its first output for all batches, (N, …)."""
    session = open_session(model)
    return np.concatenate([first_output(session, batch) for batch in batches])


def save_onnx(model: onnx.ModelProto, path: Path, limit: int = LIMIT_BYTES) -> None:
    """Write the model atomically; equal models produce equal bytes.

    Weights of more than `limit` bytes go to an external file next to it, `NAME.onnx.data`.

    Raises:
        OutputError: the file cannot be written.
    """
    external = path.with_name(path.name + ".data")
    if not is_large(model, limit):
        write_bytes(path, model.SerializeToString(deterministic=True))
        external.unlink(missing_ok=True)  # of an earlier, larger model
        return
    with atomic_folder(path.parent) as folder:
        ir.save(ir.from_proto(model), folder / path.name, external_data=external.name)


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which the large initializers are inputs; small ones can be parts of shapes."""
    light = _without_initializers(model)
    for tensor in model.graph.initializer:
        if _is_weight(tensor):
            light.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            light.graph.initializer.append(tensor)
    return light


def _is_weight(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL or tensor_bytes(tensor) > _MAX_SHAPE_BYTES


def _without_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    light = onnx.ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    light.opset_import.extend(model.opset_import)
    light.metadata_props.extend(model.metadata_props)
    light.functions.extend(model.functions)
    light.graph.name = model.graph.name
    for field in ("node", "input", "output", "value_info", "sparse_initializer"):
        getattr(light.graph, field).extend(getattr(model.graph, field))
    return light
