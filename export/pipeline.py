"""`export_checkpoint`: checkpoint → ONNX → FP16 or BF16 ONNX → engine, verified at each stage."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from calib.config import CalibrationConfig
from calib.pipeline import CalibratedFile, calibrate_file
from calib.precision import REDUCED, Decision, deciding_tensors
from export.adversary import adversary_of
from export.bisect import first_module, first_tensor
from export.io_forms import with_forms
from export.record import save_decisions, save_record
from export.reduce import reduce_precision
from export.source import load_source
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
from runtime.engine.build import build
from runtime.engine.options import BuildOptions, choose_builder
from runtime.engine.sidecar import EngineInfo
from runtime.errors import BackendUnavailable, ConfigError, DataError, EngineBuildError, ModelFileError
from runtime.graph.collect import collect
from runtime.graph.model import save_onnx
from runtime.spec import ImageSizes
from runtime.system.files import output_dir
from train.recipes import MAIN

__all__ = ["ExportResult", "default_folder", "export_checkpoint"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """What an export wrote."""

    onnx: Path
    """The FP32 ONNX file."""
    onnx_parity: Parity
    """Checkpoint against FP32 ONNX."""
    reduced_onnx: Path | None = None
    """The FP16, BF16 or INT8 ONNX file, where asked for."""
    reduced_parity: Parity | None = None
    """FP32 ONNX against it, every FP16 or BF16 tensor rounded as a GPU would."""
    calibrated: CalibratedFile | None = None
    """How the INT8 file came about."""
    kept_fp32: tuple[Decision, ...] = ()
    """Its nodes that stay in FP32."""
    engine: Path | None = None
    """The engine, where asked for."""
    engine_info: EngineInfo | None = None
    """Its sidecar."""


def export_checkpoint(
    checkpoint: str | Path,
    *,
    out: Path | None = None,
    precision: str = "fp32",
    engine: bool = False,
    batch: tuple[int, int, int] = (1, 8, 32),
    sm: Sequence[int] = (),
    flavor: str = "auto",
    build_options: BuildOptions | None = None,
    cache: bool = False,
    arch: str | None = None,
    weights: Path | None = None,
    bn: str = MAIN,
    ema: bool = True,
    data: Path | None = None,
    input_form: str = "float32 NCHW",
    output_form: str = "logits",
    io: str = "fp32",
    sizes: ImageSizes | None = None,
    calib_data: Path | None = None,
    calibration: CalibrationConfig | None = None,
    bisect: bool = True,
    progress: Callable[[str], None] | None = None,
    build_progress: Callable[[str, float], None] | None = None,
) -> ExportResult:
    """Exports a checkpoint as `model.onnx`, `model.fp16.onnx`, `model.fp16.engine` (+ `.json`).

    Args:
        checkpoint: one of ours, a plain timm state dict together with `arch`, or `timm:NAME`.
        out: folder of the results; default: the checkpoint's, or NAME.
        precision: `fp32`, `fp16`, `bf16` or `int8` (the rest FP16): the last ONNX file to make, and the engine's.
        engine: build an engine too.
        batch: smallest, most usual and largest batch size of the engine.
        sm: compute capabilities to build for; see `runtime.build`.
        flavor: engine builder; see `runtime.build`.
        build_options: `options` of `runtime.build`.
        cache: see `runtime.build`.
        arch: timm's name of the architecture, for a plain state dict.
        weights: a file of the weights of `timm:NAME`; see `load_source`.
        bn: the BatchNorm route to export.
        ema: prefer the moving average of the weights.
        data: folder of real images to verify on, instead of the checkpoint's sample.
        input_form: what the files take, one of `runtime.spec.INPUT_FORMS`.
        output_form: what they give, one of `runtime.spec.OUTPUT_FORMS`.
        io: `fp16` makes the FP16 file take and give FP16 where it would float32.
        sizes: another image size than the checkpoint's; a range leaves the size open in the
            files, and the engine takes that range.
        calib_data: of `int8`, the calibration images: a folder, a tar or NumPy file, or the calib.json of an
            earlier run.
        calibration: of `int8`, how; default: as `CalibrationConfig` has it.
        bisect: where a stage does not agree with the one before, find the first layer that does not.
        progress: called with the name of each stage as it starts.
        build_progress: `progress` of `runtime.build`.

    Raises:
        AdvPropError: see `load_source`, `to_onnx`, `runtime.build`.
        DataError: there are no real images to verify on.
        VerificationError: a stage does not agree with the one before; files are kept.
    """
    _check_choices(precision, io, calib_data)
    _check_forms(precision, input_form, output_form)
    progress = progress or log.debug
    if engine:
        _check_wishes(flavor, tuple(sm), build_options or BuildOptions(), precision == "int8")
    progress("reading the checkpoint")
    source = load_source(
        checkpoint, arch, weights=weights, bn=bn, ema=ema, data=data, size=sizes.usual if sizes else None
    )
    folder = output_dir(out if out is not None else default_folder(checkpoint))
    if not len(source.images_NHWC):
        raise DataError(f"{checkpoint} carries no images to verify the export on; give some: --data DIR")
    progress("tracing and folding")
    spec = dataclasses.replace(source.spec, input_form=input_form, output_form=output_form)
    model = to_onnx(source.model, source.spec, free_size=sizes is not None and not sizes.fixed)
    onnx_path = folder / "model.onnx"
    save_onnx(with_forms(model, spec), onnx_path)

    progress(f"verifying on {len(source.images_NHWC)} images")
    # One pass for both: what FP16 needs to know, and the logits.
    wanted = deciding_tensors(model) if precision in REDUCED else set()
    amax, logits_NK = collect(model, batches(source), tensors=wanted)
    onnx_parity = compare(torch_logits(source), logits_NK)
    first = first_module(source, model) if bisect else None
    require(onnx_parity, TOLERANCE["fp32"], str(onnx_path), "the checkpoint", first)
    if sizes is not None:
        for size in {sizes.smallest, sizes.largest} - {sizes.usual}:
            check_size(source, model, size)
    check_file(onnx_path, source, logits_NK[:FEW_IMAGES])
    stages = [(onnx_path, "the checkpoint", onnx_parity)]
    result = ExportResult(onnx=onnx_path, onnx_parity=onnx_parity)

    if precision in REDUCED:
        progress(f"converting to {precision.upper()}")
        path = folder / f"model.{precision}.onnx"
        reduced = reduce_precision(
            model,
            precision,
            amax=amax,
            logits_NK=logits_NK,
            batches=lambda: batches(source),
            run=lambda graph: graph_logits(graph, source),
        )
        if io == "fp16" and input_form == "float32 NCHW":
            spec = dataclasses.replace(spec, input_form="float16 NCHW")
        save_onnx(with_forms(reduced.model, spec, half_output=io == "fp16"), path)
        save_decisions(path.with_suffix(".json"), reduced.decisions, amax, reduced.parity)
        first = first_tensor(source, model, reduced.rounded, TOLERANCE[precision]) if bisect else None
        require(reduced.parity, TOLERANCE[precision], str(path), onnx_path.name, first)
        if precision == "fp16":
            few = dataclasses.replace(source, images_NHWC=source.images_NHWC[:FEW_IMAGES])
            check_file(path, source, graph_logits(reduced.model, few), 1e-2 if io == "fp16" else TOLERANCE["fp32"])
        stages.append((path, onnx_path.name, reduced.parity))
        result = dataclasses.replace(
            result, reduced_onnx=path, reduced_parity=reduced.parity, kept_fp32=reduced.decisions
        )
    if precision == "int8":
        assert calib_data is not None
        progress("calibrating")
        path = folder / "model.int8.onnx"
        calibrated = calibrate_file(
            onnx_path,
            calib_data,
            path,
            calibration,
            adversary=adversary_of(source),
            progress=lambda stage, done, _: progress(f"calibrating: {stage} {done}"),
        )
        parity = compare(logits_NK, graph_logits(calibrated.rounded, source))
        require(parity, TOLERANCE["int8"], str(path), onnx_path.name, min_agreement=MIN_INT8_AGREEMENT)
        stages.append((path, onnx_path.name, parity))
        result = dataclasses.replace(result, reduced_onnx=path, reduced_parity=parity, calibrated=calibrated)
    save_record(folder, spec.checkpoint_sha256, stages)
    if engine:
        progress("building the engine")
        engine_path = folder / f"model.{precision}.engine"
        last = result.reduced_onnx or onnx_path
        try:
            info = build(
                last,
                engine_path,
                batch=batch,
                sm=sm,
                flavor=flavor,
                options=dataclasses.replace(
                    build_options or BuildOptions(),
                    precision=precision,
                    image_sizes=None if sizes is None or sizes.fixed else sizes,
                ),
                cache=cache,
                progress=build_progress,
            )
        except (BackendUnavailable, EngineBuildError) as error:
            raise type(error)(f"{error}\nThe ONNX files are whole, in {folder}.") from error
        except ModelFileError as error:
            raise EngineBuildError(
                f"most of {last} had to stay in FP32, so there is no {precision} engine of it: {error}\n"
                f"The ONNX files are whole, in {folder}."
            ) from error
        result = dataclasses.replace(result, engine=engine_path, engine_info=info)
    _warn_of_leftovers(folder, [result.reduced_onnx, result.engine])
    return result


def default_folder(checkpoint: str | Path) -> Path:
    """Where files go unless told otherwise: beside the checkpoint, or in a folder of timm's name."""
    name = str(checkpoint)
    return Path(name.removeprefix("timm:")) if name.startswith("timm:") else Path(checkpoint).parent


def _check_choices(precision: str, io: str, calib_data: Path | None) -> None:
    if precision not in ("fp32", *REDUCED, "int8"):
        raise ConfigError(f"precision must be one of fp32, {', '.join(REDUCED)}, int8; found {precision!r}")
    if precision == "int8" and calib_data is None:
        raise DataError(
            "INT8 needs calibration images: --calib-data DIR with some hundred photographs such as the model will see"
        )
    if precision != "int8" and calib_data is not None:
        raise ConfigError(f"calibration images are for INT8; found the precision {precision}")
    if calib_data is not None and not calib_data.exists():
        raise DataError(f"{calib_data}: no such folder of calibration images, or manifest")
    if io not in ("fp32", "fp16"):
        raise ConfigError(f"io must be fp32 or fp16; found {io!r}")
    if io == "fp16" and precision != "fp16":
        raise ConfigError(f"FP16 in and out goes with the precision fp16; found {precision}")


def _check_forms(precision: str, input_form: str, output_form: str) -> None:
    if input_form == "float16 NCHW":
        raise ConfigError("FP16 input is of the FP16 file: io='fp16' (--io fp16)")
    if precision == "int8" and (input_form, output_form) != ("float32 NCHW", "logits"):
        raise ConfigError("INT8 files take float32 and give logits; leave --input and --output out")


def _check_wishes(flavor: str, sm: tuple[int, ...], options: BuildOptions, quantized: bool) -> None:
    """Refuses impossible targets and options before the work; a missing builder is told after the ONNX files."""
    try:
        choose_builder(flavor, sm, options, quantized=quantized)
    except BackendUnavailable:
        log.debug("no engine builder here")


def _warn_of_leftovers(folder: Path, written: Sequence[Path | None]) -> None:
    names = [f"model.{precision}.{suffix}" for precision in ("fp32", *REDUCED, "int8") for suffix in ("onnx", "engine")]
    for name in names:
        if (folder / name).exists() and folder / name not in written:
            log.warning("%s was not written by this export", folder / name)
