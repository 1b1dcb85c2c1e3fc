"""Read float32 ONNX classifiers for calibration: files of advprop, and files of other tools."""

from __future__ import annotations

from pathlib import Path

import onnx

from runtime.errors import ConfigError, ModelFileError
from runtime.graph.convert import convert_classifier
from runtime.graph.foreign import ForeignOptions, convert_command
from runtime.graph.read import load_onnx, read_onnx
from runtime.graph.structure import spec_of
from runtime.graph.summary import summarize
from runtime.spec import Preprocessing

__all__ = ["read_float_model"]


def read_float_model(source: Path, options: ForeignOptions | None) -> tuple[onnx.ModelProto, Preprocessing]:
    """Read a float32 classifier, and return it with the preprocessing of its images.

    Args:
        source: an ONNX file, written by advprop or by another tool.
        options: description of a file of another tool; required if and only if the file has no
            spec.

    Raises:
        ConfigError: `options` is given, but the file has a spec.
        ModelFileError: the file is not a float32 classifier with float32 input and logits or
            probabilities, or it has no spec and `options` is missing.
    """
    if spec_of(read_onnx(source), str(source)) is None:
        if options is None:
            raise ModelFileError(
                f"{source} has no advprop.spec, so its preprocessing is unknown",
                fix=f"pass --img-size, --mean and --std, or describe it once with {convert_command(source)}",
            )
        converted = convert_classifier(source, options)
        return converted.model, converted.spec.preprocessing
    if options is not None:
        raise ConfigError(
            f"{source} contains an advprop.spec, which specifies its preprocessing",
            fix="remove --img-size, --mean, --std and the other options for files of other tools",
        )
    summary = summarize(source)
    if set(summary.weights) - {"fp32"}:
        raise ModelFileError(
            f"{source} computes in {', '.join(summary.weights)}; calibrate the float32 file (model.onnx)"
        )
    spec = summary.spec
    assert spec is not None
    if spec.input_form != "float32 NCHW" or spec.output_form == "topk":
        raise ModelFileError(
            f"{source} has {spec.input_form} input and outputs {spec.output_form}; calibrate a file with float32 input "
            "and all logits or probabilities (advprop-export without --input and --output)"
        )
    return load_onnx(source), spec.preprocessing
