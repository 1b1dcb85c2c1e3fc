"""`calibrate_file`: an ONNX file and images → an INT8 ONNX file, with its record and pictures beside it."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from calib.config import CalibrationConfig
from calib.images import BATCH, Adversary, CalibrationSet, calibration_set, check_mix
from calib.placement import Point
from calib.plots import plot_fallback, plot_ranges
from calib.precision import deciding_tensors, overflows, to_reduced
from calib.prepare import prepared
from calib.ptq import TRIED, Calibrated, calibrate
from calib.quantize import dequantized_names
from calib.record import save_record
from runtime.errors import ConfigError, ModelFileError, VerificationError
from runtime.graph.collect import collect
from runtime.graph.model import open_session, save_onnx
from runtime.graph.rounding import with_roundings
from runtime.graph.summary import CALIBRATION_KEY, summarize
from runtime.spec import Preprocessing
from runtime.system.files import output_dir

__all__ = ["CalibratedFile", "calibrate_file"]

log = logging.getLogger(__name__)

_COMPARED = 64
"""Images on which the INT8 graph is compared with the float32 one."""
_POOR = 0.95
"""Agreement below this is warned of."""

_Batches = Callable[[int], Iterator[NDArray[np.float32]]]


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
    config: CalibrationConfig | None = None,
    *,
    preprocessing: Preprocessing | None = None,
    adversary: Adversary | None = None,
    cache: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> CalibratedFile:
    """Quantizes the file `source`.

    Beside `target` go `calib.json` (the images), `NAME.json` (every layer), `NAME.ranges.png` and, with a
    budget, `NAME.budget.png`.

    Args:
        source: a float32 ONNX classifier of float32 input and logits.
        data: real images: a folder, a tar file, an array, or the manifest of an earlier set.
        target: the INT8 file.
        config: how; see there.
        preprocessing: how an image becomes the input of a file that carries no spec.
        adversary: attacks images, where the mix has adversarial ones.
        cache: keep histograms, so that a run that was cut off goes on and another one is quick.
        progress: called with a stage's name, what is done of it, and how much it is; 0: unknown.

    Raises:
        AdvPropError: see `calibrate`, `calibration_set`, `prepared`.
        ConfigError: `target` is in the way of something, or the mix wants what is not there.
        ModelFileError: no spec and no preprocessing, another form of input, or not float32.
        VerificationError: the INT8 graph gives logits that are not finite.
    """
    config = config or CalibrationConfig()
    if target.resolve() == source.resolve() or target.suffix != ".onnx" or target.stem == "calib":
        raise ConfigError(f"the INT8 file is one of its own, NAME.onnx beside NAME.json and calib.json; found {target}")
    check_mix(config.mix, adversary)
    model, preprocessing = _read(source, preprocessing)
    output_dir(target.parent)
    chosen = calibration_set(
        data, config.images, preprocessing, held=config.budget is not None, mix=config.mix, seed=config.seed
    )
    if chosen.mix != config.mix:
        check_mix(chosen.mix, adversary)
    config = dataclasses.replace(config, mix=chosen.mix, seed=chosen.seed)
    if config.budget is not None and not chosen.held:
        raise ConfigError(f"{data} holds no images out for a budget; calibrate from the folder itself, or without one")
    batches = functools.partial(chosen.batches, preprocessing, adversary=adversary, size=_batch_size(model))
    held = {kind: functools.partial(batches, kinds=(kind,), held=True) for kind in chosen.mix}
    calibrated = calibrate(
        model,
        batches,
        config,
        held=held if config.budget is not None else None,
        images_sha256=chosen.sha256 if cache else "",
        progress=None if progress is None else _with_totals(progress, len(chosen.images) * len(chosen.mix)),
    )
    quantized = _rest_in_fp16(calibrated, batches) if config.half else calibrated.model
    onnx.helper.set_model_props(
        quantized, {entry.key: entry.value for entry in model.metadata_props} | {CALIBRATION_KEY: chosen.sha256}
    )
    agreement, compared = _agreement(model, with_roundings(quantized), batches)
    if not compared:
        raise VerificationError(f"the INT8 graph of {source.name} gives logits that are not finite; nothing written")
    _warn(source, calibrated, agreement)
    # A stop in between must leave no new record beside an old model.
    target.with_suffix(".json").unlink(missing_ok=True)
    save_onnx(quantized, target)
    save_record(target.with_suffix(".json"), calibrated, config, agreement, compared)
    chosen.save(target.with_name("calib.json"))
    plot_ranges(calibrated, target.with_suffix(".ranges.png"))
    if calibrated.fallback:
        plot_fallback(calibrated.fallback, target.with_suffix(".budget.png"))
    return CalibratedFile(calibrated=calibrated, images=chosen, parity_images=compared, agreement=agreement)


def _batch_size(model: onnx.ModelProto) -> int:
    """Images at once: one, where the graph takes no more."""
    return 1 if model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1 else BATCH


def _read(source: Path, preprocessing: Preprocessing | None) -> tuple[onnx.ModelProto, Preprocessing]:
    """The float32 graph, ours or another's, and how images become its input."""
    summary = summarize(source)
    if set(summary.weights) - {"fp32"}:
        raise ModelFileError(
            f"{source} computes in {', '.join(summary.weights)}; calibrate the float32 file (model.onnx)"
        )
    spec = summary.spec
    if spec is None:
        if preprocessing is None:
            raise ModelFileError(
                f"{source} carries no advprop.spec, so its preprocessing is unknown; export it with advprop-export, or "
                "say what it was trained with: --img-size, --mean, --std, --interpolation, --crop-pct"
            )
        return prepared(source, preprocessing), preprocessing
    if preprocessing is not None:
        raise ConfigError(f"{source} carries its preprocessing; leave --mean, --std and the like out")
    if (spec.input_form, spec.output_form) != ("float32 NCHW", "logits"):
        raise ModelFileError(
            f"{source} takes {spec.input_form} and gives {spec.output_form}; calibrate a file of float32 input and "
            "logits (advprop-export without --input and --output)"
        )
    return onnx.load(source), spec.preprocessing


def _with_totals(progress: Callable[[str, int, int], None], images: int) -> Callable[[str, int], None]:
    totals = {"ranges": images, "layers": min(images, TRIED)}
    return lambda stage, done: progress(stage, done, totals.get(stage, 0))


def _warn(source: Path, calibrated: Calibrated, agreement: float) -> None:
    if agreement < _POOR:
        log.warning("the INT8 graph agrees with %s on only %.1f %% of the images", source.name, 100 * agreement)
    fallback = calibrated.fallback
    if fallback and not fallback.met:
        log.warning(
            "the budget of %.2f points cannot be met: the best of %d choices loses %.2f, with %.1f %% of the MACs in "
            "INT8. FP16 costs nothing (--trt fp16)",
            *(100 * fallback.budget, len(fallback.trials), 100 * fallback.chosen.loss, 100 * calibrated.int8_share),
        )
    elif fallback and fallback.chosen.floating:
        log.info(
            "%d layers are given back to floating point for the budget, %.1f %% of the MACs",
            *(len(fallback.chosen.floating), 100 * (fallback.trials[0].int8_share - calibrated.int8_share)),
        )


def _rest_in_fp16(calibrated: Calibrated, batches: _Batches) -> onnx.ModelProto:
    """FP16 wherever it is not INT8, but for nodes that would overflow."""
    model = calibrated.source
    amax = collect(model, batches(_COMPARED), tensors=deciding_tensors(model)).amax
    if overflows(model, amax):
        amax = collect(model, batches(_COMPARED)).amax
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for point in calibrated.points:
        if point.int8:
            activation, weight = dequantized_names(point)
            amax[activation] = calibrated.thresholds[point.tensor]
            amax[weight] = _largest(point, constants)
    kept = overflows(calibrated.model, amax)
    for decision in kept:
        log.info("%s %s stays in FP32: %s reaches %.3g", decision.op, decision.node, decision.tensor, decision.amax)
    return to_reduced(calibrated.model, "fp16", kept)


def _largest(point: Point, constants: dict[str, onnx.TensorProto]) -> float:
    return float(np.abs(onnx.numpy_helper.to_array(constants[point.weight])).max())


def _agreement(model: onnx.ModelProto, quantized: onnx.ModelProto, batches: _Batches) -> tuple[float, int]:
    reference, candidate = open_session(model), open_session(quantized)
    name = model.graph.input[0].name
    same, count = 0, 0
    for batch in batches(_COMPARED):
        expected, found = (session.run(None, {name: batch})[0] for session in (reference, candidate))
        if not np.isfinite(found).all():
            return 0.0, 0
        same += int(np.sum(expected.argmax(1) == found.argmax(1)))
        count += len(batch)
    return same / count, count
