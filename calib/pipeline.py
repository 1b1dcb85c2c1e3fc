"""Quantize a float32 ONNX file to INT8 with calibration images, and write a record and plots."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import onnx

from calib.config import CalibrationConfig
from calib.images import BATCH, Adversary, CalibrationSet, calibration_set, check_mix
from calib.precision import deciding_tensors, overflows, to_reduced
from calib.prepare import read_float_model
from calib.ptq import TRIAL_IMAGES, Batches, Calibrated, calibrate
from calib.quantize import dequantized_inputs
from calib.report import plot_fallback, plot_ranges, save_record
from runtime.errors import ConfigError, VerificationError
from runtime.graph.collect import collect
from runtime.graph.foreign import ForeignOptions
from runtime.graph.model import first_output, open_session, save_onnx
from runtime.graph.norms import NORMS_KEY
from runtime.graph.rounding import with_roundings
from runtime.graph.structure import initializers_of, set_metadata
from runtime.graph.summary import CALIBRATION_KEY
from runtime.spec import Preprocessing
from runtime.system.files import output_dir

__all__ = ["CalibratedFile", "calibrate_file"]

log = logging.getLogger(__name__)

_COMPARED_IMAGES = 64
"""Number of images on which the INT8 graph is compared with the float32 graph."""
_LARGE_BYTES = 10**9
_MEMORY_FACTOR = 10
"""Memory of a calibration, relative to the weights. A model with 2.3 GB needed more than 18 GB."""
_LOW_AGREEMENT = 0.95
"""A warning is logged if the agreement is lower."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedFile:
    """The result of `calibrate_file`."""

    calibrated: Calibrated
    """Points, thresholds and histograms."""
    images: CalibrationSet
    """The calibration images."""
    rounded: onnx.ModelProto
    """The written graph with every rounding of a GPU, to run in ONNX Runtime on a CPU."""
    parity_images: int
    """Number of images on which the graphs were compared."""
    agreement: float
    """Share of these images on which `rounded` has the same top-1 class as the float32 graph, 0 to
    1."""


def calibrate_file(
    source: str | PathLike[str],
    data: str | PathLike[str],
    target: str | PathLike[str],
    config: CalibrationConfig | None = None,
    *,
    foreign: ForeignOptions | None = None,
    adversary: Adversary | None = None,
    cache: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> CalibratedFile:
    """Quantize the ONNX file `source` and write `target`.

    Also writes, next to `target`: `NAME.calib.json` (the images), `NAME.json` (every layer),
    `NAME.ranges.png` and, with a budget, `NAME.budget.png`.

    Args:
        source: a float32 ONNX classifier with float32 input and logits.
        data: real images: a folder, a tar file, an array, or the
            `NAME.calib.json` of an earlier run.
        target: the INT8 file to write.
        config: settings (default: `CalibrationConfig()`).
        foreign: description of a file of another tool; required if and only if `source` has no
            spec.
        adversary: attacks images; required if the mix has adversarial images.
        cache: cache histograms. An interrupted run then resumes, and other runs with these images
            are faster.
        progress: called with the stage, the number of images or layers done, and their total (0 if
            unknown).

    Raises:
        AdvPropError: see `calibrate`, `calibration_set` and `read_float_model`.
        ConfigError: `target` cannot be used, the mix is not possible, or there are no held-out
            images for the budget.
        VerificationError: the INT8 graph outputs logits that are not finite; nothing is written.
    """
    source, data, target, config = Path(source), Path(data), Path(target), config or CalibrationConfig()
    _check_target(source, target)
    check_mix(config.mix, adversary)
    model, preprocessing = read_float_model(source, foreign)
    _warn_about_memory(source, model)
    output_dir(target.parent)
    images = _choose_images(data, config, preprocessing, adversary)
    config = dataclasses.replace(config, mix=images.mix, seed=images.seed)  # a manifest has its own
    batches = functools.partial(images.batches, preprocessing, adversary=adversary, size=_batch_size(model))
    held = {kind: functools.partial(batches, kinds=(kind,), held=True) for kind in images.mix}
    calibrated = calibrate(
        model,
        batches,
        config,
        held=held if config.budget is not None else None,
        images_sha256=images.sha256 if cache else "",
        progress=_with_totals(progress, len(images.images) * len(images.mix)) if progress else None,
    )
    quantized = _reduce_rest(calibrated, batches) if config.half else calibrated.model
    _copy_metadata(model, quantized, images)
    result = _compare(source, model, quantized, calibrated, images, batches)
    _log_outcome(source, result)
    _write(target, quantized, result, config)
    return result


def _copy_metadata(model: onnx.ModelProto, quantized: onnx.ModelProto, images: CalibrationSet) -> None:
    kept = {entry.key: entry.value for entry in model.metadata_props if entry.key != NORMS_KEY}
    set_metadata(quantized, kept | {CALIBRATION_KEY: images.sha256})


def _check_target(source: Path, target: Path) -> None:
    if target.resolve() == source.resolve():
        raise ConfigError(f"the output path must differ from the input; found {target} for both")
    if target.suffix != ".onnx" or f".{target.stem}".endswith(".calib"):
        raise ConfigError(
            f"the output path must be NAME.onnx, with a NAME that does not end in calib, since NAME.calib.json lists "
            f"the images; found {target}"
        )


def _warn_about_memory(source: Path, model: onnx.ModelProto) -> None:
    size = sum(math.prod(tensor.dims) * 4 for tensor in model.graph.initializer)
    if size > _LARGE_BYTES:
        log.warning(
            "%s has %.1f GB of weights; calibration needs about %.0f GB of memory",
            *(source, size / 1e9, _MEMORY_FACTOR * size / 1e9),
        )


def _choose_images(
    data: Path, config: CalibrationConfig, preprocessing: Preprocessing, adversary: Adversary | None
) -> CalibrationSet:
    images = calibration_set(
        data, config.images, preprocessing, held=config.budget is not None, mix=config.mix, seed=config.seed
    )
    if images.mix != config.mix:
        check_mix(images.mix, adversary)
    if config.budget is not None and not images.held:
        raise ConfigError(
            f"{data} has no held-out images, which a budget needs; calibrate from the folder itself, or remove the "
            "budget"
        )
    return images


def _batch_size(model: onnx.ModelProto) -> int:
    """Return the batch size for calibration: 1 if the graph fixes it to 1, otherwise `BATCH`."""
    return 1 if model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1 else BATCH


def _with_totals(progress: Callable[[str, int, int], None], images: int) -> Callable[[str, int], None]:
    totals = {"ranges": images, "layers": min(images, TRIAL_IMAGES)}
    return lambda stage, done: progress(stage, done, totals.get(stage, 0))


def _reduce_rest(calibrated: Calibrated, batches: Batches) -> onnx.ModelProto:
    """Convert everything that is not INT8 to FP16, except nodes that would overflow."""
    model = calibrated.source
    amax = collect(model, batches(_COMPARED_IMAGES), tensors=deciding_tensors(model)).amax
    if overflows(model, amax):
        amax = collect(model, batches(_COMPARED_IMAGES)).amax
    kept = overflows(calibrated.model, amax | _dequantized_ranges(calibrated))
    for decision in kept:
        log.info("%s %s stays in FP32: %s reaches %.3g", decision.op, decision.node, decision.tensor, decision.amax)
    return to_reduced(calibrated.model, "fp16", kept)


def _dequantized_ranges(calibrated: Calibrated) -> dict[str, float]:
    """Return the largest magnitude of each dequantized activation and weight."""
    constants = initializers_of(calibrated.source.graph)
    inputs = dequantized_inputs(calibrated.model, calibrated.points)
    amax = {}
    for point in calibrated.points:
        if point.int8:
            activation, weight = inputs[point.node]
            amax[activation] = calibrated.thresholds[point.tensor]
            amax[weight] = float(np.abs(onnx.numpy_helper.to_array(constants[point.weight])).max())
    return amax


def _compare(
    source: Path,
    model: onnx.ModelProto,
    quantized: onnx.ModelProto,
    calibrated: Calibrated,
    images: CalibrationSet,
    batches: Batches,
) -> CalibratedFile:
    """Compare the top-1 classes of the INT8 graph with those of the float32 graph."""
    rounded = with_roundings(quantized)
    reference, candidate = open_session(model), open_session(rounded)
    same = count = 0
    for batch in batches(_COMPARED_IMAGES):  # both in one pass: images may be attacked, which is slow
        expected, found = first_output(reference, batch), first_output(candidate, batch)
        if not np.isfinite(found).all():
            raise VerificationError(
                f"the INT8 graph of {source.name} outputs logits that are not finite; nothing was written"
            )
        same += int(np.sum(expected.argmax(1) == found.argmax(1)))
        count += len(batch)
    return CalibratedFile(
        calibrated=calibrated, images=images, rounded=rounded, parity_images=count, agreement=same / count
    )


def _log_outcome(source: Path, result: CalibratedFile) -> None:
    calibrated = result.calibrated
    if result.agreement < _LOW_AGREEMENT:
        log.warning(
            "the INT8 graph has the same top-1 class as %s on only %.1f %% of the images",
            *(source.name, 100 * result.agreement),
        )
    fallback = calibrated.fallback
    if fallback and not fallback.met:
        log.warning(
            "the budget of %.2f points cannot be met: the best of %d choices of layers loses %.2f points, with %.1f %% "
            "of the MACs in INT8. FP16 loses no accuracy (--trt fp16)",
            *(100 * fallback.budget, len(fallback.trials), 100 * fallback.chosen.loss, 100 * calibrated.int8_share),
        )
    elif fallback and fallback.chosen.floating:
        log.info(
            "%d layers, %.1f %% of the MACs, are kept in floating point for the budget",
            *(len(fallback.chosen.floating), 100 * (fallback.trials[0].int8_share - calibrated.int8_share)),
        )


def _write(target: Path, quantized: onnx.ModelProto, result: CalibratedFile, config: CalibrationConfig) -> None:
    # Remove the old record first: an interruption must not leave a record next to a model that it
    # does not describe.
    target.with_suffix(".json").unlink(missing_ok=True)
    save_onnx(quantized, target)
    save_record(target.with_suffix(".json"), result, config)
    result.images.save(target.with_suffix(".calib.json"))
    plot_ranges(result.calibrated, target.with_suffix(".ranges.png"))
    if result.calibrated.fallback:
        plot_fallback(result.calibrated.fallback, target.with_suffix(".budget.png"))
