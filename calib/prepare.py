"""Read float32 ONNX classifiers for calibration, and prepare files of other tools.

A prepared model has unique node names, weights as initializers, and its BatchNorms folded.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import onnx
from onnx import TensorProto, version_converter

from runtime.errors import ConfigError, ModelFileError, first_line
from runtime.graph.model import MIN_OPSET, OPSET, tensor_types
from runtime.graph.structure import graph_inputs, opset_of, shape_of
from runtime.graph.summary import summarize
from runtime.spec import METADATA_KEY, ModelSpec, Preprocessing

__all__ = ["prepare_model", "read_float_model"]

_LOG_ERRORS_ONLY = 3


def read_float_model(source: Path, preprocessing: Preprocessing | None) -> tuple[onnx.ModelProto, Preprocessing]:
    """Read a float32 classifier, and return it with the preprocessing of its images.

    Args:
        source: an ONNX file, written by advprop or by another tool.
        preprocessing: preprocessing of the images; required if and only if the file has no spec.

    Raises:
        ConfigError: `preprocessing` is given, but the file has a spec.
        ModelFileError: the file is not a float32 classifier with float32 input and logits, or it
            has no spec and `preprocessing` is missing.
    """
    summary = summarize(source)
    if set(summary.weights) - {"fp32"}:
        raise ModelFileError(
            f"{source} computes in {', '.join(summary.weights)}; calibrate the float32 file (model.onnx)"
        )
    spec = summary.spec
    if spec is None:
        if preprocessing is None:
            raise ModelFileError(
                f"{source} has no advprop.spec, so its preprocessing is unknown. Export the model with "
                "advprop-export, or pass the preprocessing: --img-size, --mean, --std, --interpolation, --crop-pct"
            )
        return prepare_model(source, preprocessing), preprocessing
    if preprocessing is not None:
        raise ConfigError(
            f"{source} specifies its preprocessing; remove --img-size, --mean, --std, --interpolation and --crop-pct"
        )
    if (spec.input_form, spec.output_form) != ("float32 NCHW", "logits"):
        raise ModelFileError(
            f"{source} has {spec.input_form} input and outputs {spec.output_form}; calibrate a file with float32 input "
            "and logits (advprop-export without --input and --output)"
        )
    return onnx.load(source), spec.preprocessing


def prepare_model(path: Path, preprocessing: Preprocessing) -> onnx.ModelProto:
    """Read and prepare a file of another tool.

    ONNX Runtime's basic optimizations fold BatchNorms and constants; the result has standard
    operators only.

    Args:
        path: a float32 ONNX classifier of images.
        preprocessing: preprocessing of the images. It becomes part of the result's spec, in which
            the classes are named by their numbers.

    Raises:
        ModelFileError: the file is not such a classifier, expects another image size, or uses an
            operator that ONNX Runtime does not have.
    """
    model = onnx.load(path)
    inputs, outputs = graph_inputs(model.graph), model.graph.output
    if len(inputs) != 1 or len(outputs) != 1:
        raise ModelFileError(
            f"{path} has {len(inputs)} inputs and {len(outputs)} outputs; expected one image input and one logits "
            "output"
        )
    _check_input(path, inputs[0], preprocessing)
    opset = opset_of(model)
    if opset < MIN_OPSET:
        try:
            model = version_converter.convert_version(model, OPSET)
        except (RuntimeError, ValueError) as error:
            raise ModelFileError(
                f"{path} has opset {opset} and cannot be converted to {OPSET} ({first_line(error)}); "
                f"export it with opset {OPSET}"
            ) from error
    model = _optimize(path, model)
    _name_nodes(model)
    onnx.helper.set_model_props(model, {METADATA_KEY: _make_spec(path, model, preprocessing).to_json()})
    return model


def _check_input(path: Path, value: onnx.ValueInfoProto, preprocessing: Preprocessing) -> None:
    kind = value.type.tensor_type
    sizes = list(shape_of(kind))
    expected = (3, preprocessing.height, preprocessing.width)
    fits = len(sizes) == 4 and all(size in (-1, want) for size, want in zip(sizes[1:], expected, strict=True))
    if kind.elem_type != TensorProto.FLOAT or not fits or sizes[0] not in (-1, 1):
        name = TensorProto.DataType.Name(kind.elem_type).lower()
        raise ModelFileError(
            f"{path} has {name} input {sizes}; expected float [any or 1, {expected[0]}, {expected[1]}, {expected[2]}]: "
            "normalized images, channels first. Check --img-size"
        )


def _optimize(path: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = _LOG_ERRORS_ONLY
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        try:
            ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no other common base
            raise ModelFileError(f"ONNX Runtime cannot run {path}: {first_line(error)}") from error
        return onnx.load(options.optimized_model_filepath)


def _name_nodes(model: onnx.ModelProto) -> None:
    """Rename nodes whose name is empty or not unique."""
    names = Counter(node.name for node in model.graph.node)
    for number, node in enumerate(model.graph.node):
        if not node.name or names[node.name] > 1:
            node.name = f"{node.op_type}_{number}"


def _make_spec(path: Path, model: onnx.ModelProto, preprocessing: Preprocessing) -> ModelSpec:
    shape = shape_of(tensor_types(model)[model.graph.output[0].name])
    classes = shape[1] if len(shape) == 2 else 0
    if classes < 2:
        raise ModelFileError(f"{path} has an output of shape {list(shape)}; expected logits [N, classes]")
    return ModelSpec(arch=path.stem, classes=tuple(map(str, range(classes))), preprocessing=preprocessing)
