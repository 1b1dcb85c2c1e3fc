"""`calibrate_file`: an ONNX file and a folder of images → an INT8 ONNX file, with its record beside it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from calib.collect import collect
from calib.graphs import open_session
from calib.images import CalibrationSet, calibration_set
from calib.precision import deciding_tensors, overflows, to_reduced
from calib.ptq import TRIED, Calibrated, calibrate
from calib.quantize import dequantised_names
from calib.rounding import with_roundings
from runtime.engine.graph import CALIBRATION_KEY, summarise
from runtime.errors import ConfigError, ModelFileError, VerificationError
from runtime.files import output_dir, write_bytes, write_text
from runtime.spec import Preprocessing

__all__ = ["CalibratedFile", "calibrate_file"]

log = logging.getLogger(__name__)

_COMPARED = 64
"""Images on which the INT8 graph is compared with the float32 one."""
_POOR = 0.95
"""Agreement below this is warned of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedFile:
    """What was written."""

    calibrated: Calibrated
    """Points, thresholds, histograms."""
    images: CalibrationSet
    """What it was calibrated on."""
    parity_images: int
    """Images compared."""
    agreement: float
    """Share of them with the float32 graph's top-1 class, 0 to 1."""


def calibrate_file(
    source: Path,
    data: Path,
    target: Path,
    *,
    images: int = 256,
    method: str = "auto",
    correct_bias: bool = True,
    keep: Sequence[str] = (),
    half: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> CalibratedFile:
    """Quantises the file `source`.

    Args:
        source: a float32 ONNX classifier that carries its spec, of float32 input and logits.
        data: a folder of real images, or the manifest of an earlier set.
        target: the INT8 file; `calib.json` and `NAME.json` are written beside it.
        images: the most images to take from a folder.
        method: see `calibrate`.
        correct_bias: see `calibrate`.
        keep: see `calibrate`.
        half: make everything FP16 that is not INT8.
        progress: called with a stage's name, its images so far and their number.

    Raises:
        AdvPropError: see `calibrate`, `calibration_set`.
        ConfigError: `target` is in the way of something.
        ModelFileError: no spec, another form of input, or not float32.
        VerificationError: the INT8 graph gives logits that are not finite.
    """
    if target.resolve() == source.resolve() or target.suffix != ".onnx" or target.stem == "calib":
        raise ConfigError(f"the INT8 file is one of its own, NAME.onnx beside NAME.json and calib.json; found {target}")
    summary = summarise(source)
    if set(summary.weights) != {"fp32"}:
        found = ", ".join(summary.weights) or "nothing"
        raise ModelFileError(f"{source} computes in {found}; calibrate the float32 file (model.onnx)")
    spec = summary.spec
    if spec is None:
        raise ModelFileError(
            f"{source} carries no advprop.spec, so its preprocessing is unknown; export it with advprop-export"
        )
    if (spec.input_form, spec.output_form) != ("float32 NCHW", "logits"):
        raise ModelFileError(
            f"{source} takes {spec.input_form} and gives {spec.output_form}; calibrate a file of float32 input and "
            "logits (advprop-export without --input and --output)"
        )
    output_dir(target.parent)
    chosen = calibration_set(data, images, spec.preprocessing)
    model = onnx.load(source)
    total = len(chosen.names)
    totals = {"layers": min(total, TRIED)}
    calibrated = calibrate(
        model,
        lambda count: chosen.batches(spec.preprocessing, count),
        method=method,
        correct_bias=correct_bias,
        keep=keep,
        progress=None if progress is None else lambda stage, done: progress(stage, done, totals.get(stage, total)),
    )
    quantised = _rest_in_fp16(model, calibrated, chosen, spec.preprocessing) if half else calibrated.model
    onnx.helper.set_model_props(
        quantised, {entry.key: entry.value for entry in model.metadata_props} | {CALIBRATION_KEY: chosen.sha256}
    )
    agreement, compared = _agreement(model, with_roundings(quantised), chosen, spec.preprocessing)
    if not compared:
        raise VerificationError(f"the INT8 graph of {source.name} gives logits that are not finite; nothing written")
    if agreement < _POOR:
        log.warning("the INT8 graph agrees with %s on only %.1f %% of the images", source.name, 100 * agreement)
    # A stop in between must leave no new record beside an old model.
    target.with_suffix(".json").unlink(missing_ok=True)
    write_bytes(target, quantised.SerializeToString(deterministic=True))
    _save_record(target.with_suffix(".json"), calibrated, agreement, compared)
    chosen.save(target.with_name("calib.json"))
    return CalibratedFile(calibrated=calibrated, images=chosen, parity_images=compared, agreement=agreement)


def _rest_in_fp16(
    model: onnx.ModelProto, calibrated: Calibrated, images: CalibrationSet, spec: Preprocessing
) -> onnx.ModelProto:
    """FP16 wherever it is not INT8, but for nodes that would overflow."""
    amax = collect(model, images.batches(spec, _COMPARED), tensors=deciding_tensors(model)).amax
    if overflows(model, amax):
        amax = collect(model, images.batches(spec, _COMPARED)).amax
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for point in calibrated.points:
        if point.int8:
            activation, weight = dequantised_names(point)
            amax[activation] = calibrated.thresholds[point.tensor]
            amax[weight] = float(np.abs(onnx.numpy_helper.to_array(constants[point.weight])).max())
    kept = overflows(calibrated.model, amax)
    for decision in kept:
        log.info("%s %s stays in FP32: %s reaches %.3g", decision.op, decision.node, decision.tensor, decision.amax)
    return to_reduced(calibrated.model, "fp16", kept)


def _agreement(
    model: onnx.ModelProto, quantised: onnx.ModelProto, images: CalibrationSet, spec: Preprocessing
) -> tuple[float, int]:
    reference, candidate = open_session(model), open_session(quantised)
    name = model.graph.input[0].name
    same, count = 0, 0
    for batch in images.batches(spec, _COMPARED):
        expected, found = (session.run(None, {name: batch})[0] for session in (reference, candidate))
        if not np.isfinite(found).all():
            return 0.0, 0
        same += int(np.sum(expected.argmax(1) == found.argmax(1)))
        count += len(batch)
    return same / count, count


def _save_record(path: Path, calibrated: Calibrated, agreement: float, images: int) -> None:
    layers = {layer.node: layer for layer in calibrated.layers}
    content = {
        "format": "advprop.int8/1",
        "int8_share_of_macs": calibrated.int8_share,
        "agreement": agreement,
        "compared_images": images,
        "nodes": [
            dataclasses.asdict(point)
            | {
                "threshold": calibrated.thresholds.get(point.tensor) if point.int8 else None,
                "largest": calibrated.histograms[point.tensor].amax if point.int8 else None,
                "noise": layers[point.node].noise if point.node in layers else None,
            }
            for point in calibrated.points
        ],
    }
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
