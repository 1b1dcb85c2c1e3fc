"""Any float32 ONNX classifier → one that can be quantized: named nodes, constants in place, BatchNorm folded."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import onnx
from onnx import TensorProto, version_converter

from runtime.errors import ModelFileError, first_line
from runtime.graph.model import tensor_types
from runtime.spec import METADATA_KEY, ModelSpec, Preprocessing

__all__ = ["prepared"]

_OPSET = 20
"""Older graphs are converted to it: FP16 scales are legal from 19 on."""
_LEAST_OPSET = 19
_LOG_ERRORS_ONLY = 3


def prepared(path: Path, preprocessing: Preprocessing) -> onnx.ModelProto:
    """Reads a file that is not ours.

    ONNX Runtime's basic optimizations fold BatchNorm and constants; they leave standard operators only.

    Args:
        path: a float32 ONNX classifier of images.
        preprocessing: how an image becomes its input; goes into the spec of the result, with numbers for classes.

    Raises:
        ModelFileError: not such a file, of another image size, or an operator that ONNX Runtime does not have.
    """
    model = onnx.load(path)
    inputs, outputs = _ends(model)
    if len(inputs) != 1 or len(outputs) != 1:
        raise ModelFileError(
            f"{path} has {len(inputs)} inputs and {len(outputs)} outputs; expected one of images and one of logits"
        )
    _check_input(path, inputs[0], preprocessing)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < _LEAST_OPSET:
        try:
            model = version_converter.convert_version(model, _OPSET)
        except (RuntimeError, ValueError) as error:
            raise ModelFileError(
                f"{path} is of opset {opset} and cannot be converted to {_OPSET} ({first_line(error)}); "
                f"export it with opset {_OPSET}"
            ) from error
    model = _optimized(path, model)
    _name_nodes(model)
    onnx.helper.set_model_props(model, {METADATA_KEY: _spec(path, model, preprocessing).to_json()})
    return model


def _ends(model: onnx.ModelProto) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    constants = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in constants], list(model.graph.output)


def _check_input(path: Path, value: onnx.ValueInfoProto, preprocessing: Preprocessing) -> None:
    kind = value.type.tensor_type
    sizes = [size.dim_value if size.HasField("dim_value") else -1 for size in kind.shape.dim]
    wanted = (3, preprocessing.height, preprocessing.width)
    fits = len(sizes) == 4 and all(size in (-1, want) for size, want in zip(sizes[1:], wanted, strict=True))
    if kind.elem_type != TensorProto.FLOAT or not fits or sizes[0] not in (-1, 1):
        name = TensorProto.DataType.Name(kind.elem_type).lower()
        raise ModelFileError(
            f"{path} takes {name} {sizes}; expected float [any or 1, {wanted[0]}, {wanted[1]}, {wanted[2]}]: "
            "normalized images, channels first. Is --img-size right?"
        )


def _optimized(path: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = _LOG_ERRORS_ONLY
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        try:
            ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no base but this
            raise ModelFileError(f"ONNX Runtime cannot run {path}: {first_line(error)}") from error
        return onnx.load(options.optimized_model_filepath)


def _name_nodes(model: onnx.ModelProto) -> None:
    """Gives every node a name of its own, where one has none or shares it."""
    names = Counter(node.name for node in model.graph.node)
    for number, node in enumerate(model.graph.node):
        if not node.name or names[node.name] > 1:
            node.name = f"{node.op_type}_{number}"


def _spec(path: Path, model: onnx.ModelProto, preprocessing: Preprocessing) -> ModelSpec:
    shape = tensor_types(model)[model.graph.output[0].name].shape.dim
    classes = shape[1].dim_value if len(shape) == 2 else 0
    if classes < 2:
        raise ModelFileError(f"{path} gives {len(shape)} dimensions, {classes} classes; expected logits (N, classes)")
    return ModelSpec(arch=path.stem, classes=tuple(map(str, range(classes))), preprocessing=preprocessing)
