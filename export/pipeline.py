"""Export a checkpoint to ONNX, reduced precision and an engine, and verify each stage."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from numpy import float32
from numpy.typing import NDArray

from calib.pipeline import CalibratedFile, calibrate_file
from calib.precision import REDUCED, Decision, deciding_tensors
from export.adversary import adversary_of
from export.bisect import first_module, first_tensor
from export.config import PRECISIONS, EngineConfig, ExportConfig
from export.inference_form import can_be_reparameterized, inference_form
from export.io_forms import with_forms
from export.record import save_decisions, save_record
from export.reduce import reduce_precision
from export.source import Source, load_source, with_unused_images
from export.to_onnx import to_onnx
from export.verify import (
    FEW_IMAGES,
    MIN_INT8_AGREEMENT,
    TOLERANCE,
    Parity,
    batches,
    check_file,
    check_size,
    compare,
    graph_logits,
    require,
    torch_logits,
)
from runtime.adapt.confidence import with_confidence
from runtime.adapt.moments import with_clean_moments
from runtime.engine.build import build
from runtime.engine.options import choose_builder
from runtime.engine.sidecar import EngineInfo
from runtime.errors import BackendUnavailable, DataError, EngineBuildError, ModelFileError
from runtime.graph.collect import collect
from runtime.graph.model import save_onnx
from runtime.spec import ModelSpec
from runtime.system.files import output_dir

__all__ = ["ExportResult", "default_folder", "export_checkpoint"]

log = logging.getLogger(__name__)

Progress = Callable[[str], None]
"""Called with the name of each stage as it starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """The files of an export, and how they compare with each other."""

    onnx: Path
    """The FP32 ONNX file."""
    onnx_parity: Parity
    """FP32 ONNX compared with the checkpoint."""
    reduced_onnx: Path | None = None
    """The FP16, BF16 or INT8 ONNX file, if requested."""
    reduced_parity: Parity | None = None
    """That file compared with the FP32 file, with every tensor rounded as on a GPU."""
    calibrated: CalibratedFile | None = None
    """Result of the INT8 calibration."""
    kept_fp32: tuple[Decision, ...] = ()
    """Nodes of the FP16 or BF16 file that stay in FP32."""
    engine: Path | None = None
    """The engine, if requested."""
    engine_info: EngineInfo | None = None
    """The engine's sidecar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Float32:
    """The verified FP32 stage, from which the others start."""

    source: Source
    spec: ModelSpec
    """Description of the file, with its input and output form."""
    model: onnx.ModelProto
    """The graph with float32 input and logits."""
    path: Path
    parity: Parity
    amax: dict[str, float]
    """Largest magnitudes of the tensors that decide which nodes stay in FP32."""
    logits_NK: NDArray[float32]


def export_checkpoint(
    checkpoint: str | Path,
    config: ExportConfig | None = None,
    *,
    progress: Progress | None = None,
    build_progress: Callable[[str, float], None] | None = None,
) -> ExportResult:
    """Export a checkpoint to `model.onnx`, `model.fp16.onnx`, `model.fp16.engine` (+ `.json`), …

    Args:
        checkpoint: an advprop checkpoint, a plain timm state dict together with `config.arch`, or
            `timm:NAME`.
        config: settings (default: write `model.onnx` only).
        progress: called with the name of each stage as it starts.
        build_progress: `progress` of `runtime.build`.

    Raises:
        AdvPropError: see `load_source`, `to_onnx`, `calibrate_file` and `runtime.build`.
        DataError: there are no real images to verify on.
        VerificationError: a stage does not agree with the previous one; all files are kept.
    """
    config = config or ExportConfig()
    progress = progress or log.debug
    if config.engine:
        _check_engine(config.engine, quantized=config.precision == "int8")
    progress("reading the checkpoint")
    source = load_source(
        checkpoint,
        config.arch,
        weights=config.weights,
        route=config.route,
        ema=config.ema,
        data=config.data,
        size=config.sizes.usual if config.sizes else None,
    )
    if not len(source.images_NHWC) and config.calib_data is not None:
        source, calibration = with_unused_images(source, config.calib_data, config.calibration)
        config = dataclasses.replace(config, calibration=calibration)
    if not len(source.images_NHWC):
        raise DataError(f"{checkpoint} contains no images to verify the export on; add --data DIR")
    folder = output_dir(config.out if config.out is not None else default_folder(checkpoint))
    first = _export_fp32(source, config, folder, progress)
    result = ExportResult(onnx=first.path, onnx_parity=first.parity)
    stages = [(first.path, "the checkpoint", first.parity)]
    if config.precision in REDUCED:
        result = _export_reduced(first, config, result, progress)
    elif config.precision == "int8":
        result = _export_int8(first, config, result, progress)
    if result.reduced_onnx and result.reduced_parity:
        stages.append((result.reduced_onnx, first.path.name, result.reduced_parity))
    reparameterized = can_be_reparameterized(source.model)
    save_record(folder, source.spec.checkpoint_sha256, stages, reparameterized=reparameterized)
    if config.engine:
        progress("building the engine")
        result = _build_engine(result, config, config.engine, build_progress)
    _warn_about_other_files(folder, [result.reduced_onnx, result.engine])
    return result


def default_folder(checkpoint: str | Path) -> Path:
    """Return the default output folder: the checkpoint's, or NAME for `timm:NAME`."""
    name = str(checkpoint)
    return Path(name.removeprefix("timm:")) if name.startswith("timm:") else Path(checkpoint).parent


def _check_engine(engine: EngineConfig, *, quantized: bool) -> None:
    """Reject impossible targets and options before any work is done."""
    try:
        choose_builder(engine.flavor, engine.sm, engine.options, quantized=quantized)
    except BackendUnavailable:  # reported after the ONNX files are written
        log.debug("no engine builder is available")


def _export_fp32(source: Source, config: ExportConfig, folder: Path, progress: Progress) -> _Float32:
    progress("tracing and folding")
    sizes = config.sizes
    spec = dataclasses.replace(source.spec, input_form=config.input_form, output_form=config.output_form)
    deployed = dataclasses.replace(source, model=inference_form(source.model))
    model = to_onnx(deployed.model, source.spec, free_size=sizes is not None and not sizes.fixed)
    progress(f"verifying on {len(source.images_NHWC)} images")
    # One pass measures both the logits and the ranges that FP16 needs.
    wanted = deciding_tensors(model) if config.precision in REDUCED else set()
    amax, logits_NK = collect(model, batches(source), tensors=wanted)
    model = with_clean_moments(model, batches(source))
    if len(source.labels_N) == len(logits_NK):
        model = with_confidence(model, logits_NK, source.labels_N)
    path = folder / "model.onnx"
    save_onnx(with_forms(model, spec), path)
    parity = compare(torch_logits(source), logits_NK)
    find = first_module(deployed, model) if config.bisect else None
    require(parity, TOLERANCE["fp32"], str(path), "the checkpoint", find)
    if sizes is not None:
        for size in {sizes.smallest, sizes.largest} - {sizes.usual}:
            check_size(source, model, size)
    check_file(path, source, logits_NK[:FEW_IMAGES])
    return _Float32(source=source, spec=spec, model=model, path=path, parity=parity, amax=amax, logits_NK=logits_NK)


def _export_reduced(first: _Float32, config: ExportConfig, result: ExportResult, progress: Progress) -> ExportResult:
    precision, source, half_io = config.precision, first.source, config.io == "fp16"
    progress(f"converting to {precision.upper()}")
    path = first.path.with_name(f"model.{precision}.onnx")
    reduced = reduce_precision(
        first.model,
        precision,
        amax=first.amax,
        logits_NK=first.logits_NK,
        batches=lambda: batches(source),
        run=lambda graph: graph_logits(graph, source),
    )
    spec = first.spec
    if half_io and config.input_form == "float32 NCHW":
        spec = dataclasses.replace(spec, input_form="float16 NCHW")
    save_onnx(with_forms(reduced.model, spec, half_output=half_io), path)
    save_decisions(path.with_suffix(".json"), reduced.decisions, first.amax, reduced.parity)
    find = first_tensor(source, first.model, reduced.rounded, TOLERANCE[precision]) if config.bisect else None
    require(reduced.parity, TOLERANCE[precision], str(path), first.path.name, find)
    if precision == "fp16":
        few = dataclasses.replace(source, images_NHWC=source.images_NHWC[:FEW_IMAGES])
        check_file(path, source, graph_logits(reduced.model, few), 1e-2 if half_io else TOLERANCE["fp32"])
    return dataclasses.replace(result, reduced_onnx=path, reduced_parity=reduced.parity, kept_fp32=reduced.decisions)


def _export_int8(first: _Float32, config: ExportConfig, result: ExportResult, progress: Progress) -> ExportResult:
    assert config.calib_data is not None
    progress("calibrating")
    path = first.path.with_name("model.int8.onnx")
    calibrated = calibrate_file(
        first.path,
        config.calib_data,
        path,
        config.calibration,
        adversary=adversary_of(first.source),
        progress=lambda stage, done, _: progress(f"calibrating: {stage} {done}"),
    )
    parity = compare(first.logits_NK, graph_logits(calibrated.rounded, first.source))
    require(parity, TOLERANCE["int8"], str(path), first.path.name, min_agreement=MIN_INT8_AGREEMENT)
    return dataclasses.replace(result, reduced_onnx=path, reduced_parity=parity, calibrated=calibrated)


def _build_engine(
    result: ExportResult,
    config: ExportConfig,
    engine: EngineConfig,
    progress: Callable[[str, float], None] | None,
) -> ExportResult:
    source = result.reduced_onnx or result.onnx
    folder, sizes = source.parent, config.sizes
    target = folder / f"model.{config.precision}.engine"
    options = dataclasses.replace(
        engine.options,
        precision=config.precision,
        image_sizes=None if sizes is None or sizes.fixed else sizes,
    )
    kept = f"The ONNX files are complete, in {folder}."
    try:
        info = build(
            source,
            target,
            batch=engine.batch,
            sm=engine.sm,
            flavor=engine.flavor,
            options=options,
            cache=engine.cache,
            progress=progress,
        )
    except (BackendUnavailable, EngineBuildError) as error:
        raise type(error)(f"{error}\n{kept}") from error
    except ModelFileError as error:
        raise EngineBuildError(
            f"most of {source} had to stay in FP32, so no {config.precision} engine can be built: {error}\n{kept}"
        ) from error
    return dataclasses.replace(result, engine=target, engine_info=info)


def _warn_about_other_files(folder: Path, written: Sequence[Path | None]) -> None:
    for precision in PRECISIONS:
        for suffix in ("onnx", "engine"):
            path = folder / f"model.{precision}.{suffix}"
            if path.exists() and path not in written:
                log.warning("%s is from an earlier export", path)
