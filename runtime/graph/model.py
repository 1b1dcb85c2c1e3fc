"""ONNX models in memory, of any size: checked, inferred, run, saved.

Protobuf writes no more than 2 GiB, so a larger model can be handed to none of these at once. Its
shapes are inferred and it is checked without its weights, and ONNX Runtime takes them beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from runtime.system.files import atomic_folder, write_bytes

__all__ = [
    "LIMIT_BYTES",
    "check",
    "infer_shapes",
    "is_large",
    "open_session",
    "save_onnx",
    "tensor_types",
    "with_outputs",
]

LIMIT_BYTES = 2**31 - 2**26
"""Weights up to this size travel in the model itself: protobuf's 2 GiB, less 64 MiB for the graph."""

_SMALL = 1024
"""Tensors up to this size stay where they are: shapes are inferred from the values of some."""


def is_large(model: onnx.ModelProto, limit: int = LIMIT_BYTES) -> bool:
    """Tells whether the weights pass `limit` bytes."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer) > limit


def infer_shapes(model: onnx.ModelProto, limit: int = LIMIT_BYTES) -> onnx.GraphProto:
    """Returns the graph with the types and shapes of its tensors; without the weights of a large one."""
    return onnx.shape_inference.infer_shapes(_without_weights(model) if is_large(model, limit) else model).graph


def tensor_types(model: onnx.ModelProto, limit: int = LIMIT_BYTES) -> dict[str, onnx.TypeProto.Tensor]:
    """Returns the type and shape of every input, output and node output whose type is known, by name."""
    graph = infer_shapes(model, limit)
    return {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.input, *graph.output)}


def with_outputs(
    model: onnx.ModelProto, names: Iterable[str], kinds: Mapping[str, int] | None = None
) -> onnx.ModelProto:
    """Returns a copy that also gives some inner tensors.

    Args:
        model: not changed.
        names: of the tensors; those that are outputs already stay as they are.
        kinds: ONNX's number of the type of those that are not float32.
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
    """Runs ONNX's checker and its shape inference. Raises onnx.checker.ValidationError or InferenceError."""
    onnx.checker.check_model(_without_weights(model) if is_large(model, limit) else model, full_check=True)


def open_session(model: onnx.ModelProto, limit: int = LIMIT_BYTES) -> Any:
    """Returns an `onnxruntime.InferenceSession` of `model` on the CPU, with exact Q/DQ arithmetic."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    # Q/DQ pairs run as they are written: ONNX Runtime's INT8 kernels saturate on CPUs without VNNI.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not is_large(model, limit):
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    light = _frame(model)
    names, values = [], []
    for tensor in model.graph.initializer:
        if not _is_weight(tensor):
            light.graph.initializer.append(tensor)
            continue
        reference = light.graph.initializer.add(
            name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=TensorProto.EXTERNAL
        )
        for key, value in (("location", "in memory"), ("offset", "0"), ("length", str(len(tensor.raw_data)))):
            reference.external_data.add(key=key, value=value)
        names.append(tensor.name)
        values.append(ort.OrtValue.ortvalue_from_numpy(numpy_helper.to_array(tensor)))
    options.add_external_initializers(names, values)
    return ort.InferenceSession(light.SerializeToString(), options, providers=["CPUExecutionProvider"])


def save_onnx(model: onnx.ModelProto, path: Path, limit: int = LIMIT_BYTES) -> None:
    """Writes `model` atomically; the same model gives the same bytes. Raises OutputError.

    Weights of more than `limit` bytes go to a file beside it, `NAME.onnx.data`.
    """
    beside = path.with_name(path.name + ".data")
    if not is_large(model, limit):
        write_bytes(path, model.SerializeToString(deterministic=True))
        beside.unlink(missing_ok=True)  # of an earlier, larger model
        return
    with atomic_folder(path.parent) as folder:
        ir.save(ir.from_proto(model), folder / path.name, external_data=beside.name)


def _is_weight(tensor: onnx.TensorProto) -> bool:
    return len(tensor.raw_data) > _SMALL


def _frame(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without initializers."""
    frame = onnx.ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    frame.opset_import.extend(model.opset_import)
    frame.metadata_props.extend(model.metadata_props)
    graph = frame.graph
    graph.name = model.graph.name
    for field in ("node", "input", "output", "value_info"):
        getattr(graph, field).extend(getattr(model.graph, field))
    return frame


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose weights are inputs."""
    light = _frame(model)
    for tensor in model.graph.initializer:
        if _is_weight(tensor):
            light.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            light.graph.initializer.append(tensor)
    return light
