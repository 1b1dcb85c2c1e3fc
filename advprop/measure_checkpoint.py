"""Export a checkpoint to several precisions and evaluate all of the files, for a report."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from advprop.checkpoints import load_predictor
from advprop.split import Split, split
from export.config import PRECISIONS, ExportConfig
from export.pipeline import export_checkpoint
from export.record import read_record
from runtime.errors import ConfigError, DataError, nearest
from runtime.evaluate.cells import SuiteConfig
from runtime.evaluate.models import Model, load_model
from runtime.evaluate.names import ModelPath
from runtime.evaluate.results import Result, describe, is_whole, read_result, write_result
from runtime.evaluate.run import RunConfig, evaluate
from runtime.evaluate.suites import open_suite
from runtime.graph.summary import summarize
from runtime.system.files import output_dir

__all__ = ["MeasureConfig", "measure_checkpoint"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureConfig:
    """Settings of `measure_checkpoint`."""

    precisions: tuple[str, ...]
    """Precisions to export, from `PRECISIONS`, each at most once."""
    suite: SuiteConfig
    """Test set to measure."""
    folder: Path
    """Folder for exported files and results; an interrupted run resumes from it."""
    calib_data: Path | None = None
    """Images to calibrate INT8 on (default: images of the suite's folder that are not
    evaluated)."""
    calib_images: int = 256
    """Maximum number of calibration images."""
    workers: int | None = None
    """Processes that decode and corrupt images (default: cores − 1, at most 8)."""
    batch_size: int = 8
    """Images per batch."""
    device: str = "auto"
    """Device of checkpoint and files: `auto`, `cpu` or `cuda`."""
    threads: int = 0
    """CPU threads of ONNX Runtime; 0 uses all cores."""

    def __post_init__(self) -> None:
        for precision in self.precisions:
            if precision not in PRECISIONS:
                hint = nearest(precision, PRECISIONS)
                raise ConfigError(
                    f"expected precisions {', '.join(PRECISIONS)}; found {precision!r}; {hint}".rstrip("; ")
                )
        if not self.precisions or len(set(self.precisions)) < len(self.precisions):
            raise ConfigError(
                f"expected at least one precision, each precision once; found {','.join(self.precisions) or 'none'}"
            )
        if self.calib_data is not None and "int8" not in self.precisions:
            raise ConfigError("calibration images require the precision int8, which is not among the precisions")


def measure_checkpoint(
    checkpoint: Path, config: MeasureConfig, progress: Callable[[str], None] | None = None
) -> tuple[list[Path], str]:
    """Export a checkpoint, and evaluate it and the exported files. Finished steps are skipped.

    Args:
        checkpoint: an advprop checkpoint. It is the reference that the exported files are compared
            with, image by image.
        config: precisions, test set and folder.
        progress: receives a description of each step when the step starts.

    Returns:
        Result files, the checkpoint's first, and a description of the calibration images ("" if no
        file is calibrated).

    Raises:
        AdvPropError: see `export_checkpoint`, `evaluate` and `split`.
    """
    progress = progress or log.debug
    output_dir(config.folder)
    progress("reading the checkpoint")
    reference = load_model(checkpoint, device=config.device, checkpoint_loader=load_predictor)
    if config.suite.name == "corruptions":
        opened = open_suite(config.suite, reference.spec)
        opened.probe({cell.id for cell in opened.cells}, reference.spec.preprocessing)  # fail before the exports
    parts, suite = None, config.suite
    if "int8" in config.precisions:
        progress("choosing calibration images")
        parts = split(suite, reference.spec, config.calib_data, config.calib_images)
        suite = parts.suite
    files = [_export(checkpoint, reference, precision, config, parts, progress) for precision in config.precisions]
    name = ModelPath(path=checkpoint).default_name()
    models = [reference]
    for file, precision in zip(files, config.precisions, strict=True):
        model = load_model(file, device=config.device, threads=config.threads)
        models.append(dataclasses.replace(model, name=f"{name}.{precision}"))
    return _evaluate(models, suite, config, progress), parts.description if parts else ""


def _export(
    checkpoint: Path,
    reference: Model,
    precision: str,
    config: MeasureConfig,
    parts: Split | None,
    progress: Callable[[str], None],
) -> Path:
    folder = output_dir(config.folder / precision)
    file = folder / ("model.onnx" if precision == "fp32" else f"model.{precision}.onnx")
    chosen = parts.calibration if parts and precision == "int8" else None
    if _is_current_export(file, str(reference.facts["sha256"]), chosen.sha256 if chosen else ""):
        log.info("%s exists from an earlier run", file)
        return file
    manifest = None
    if chosen is not None:
        manifest = folder / "chosen.json"
        chosen.save(manifest)
    export_checkpoint(
        checkpoint,
        ExportConfig(out=folder, precision=precision, calib_data=manifest),
        progress=lambda stage: progress(f"{precision}: {stage}"),
    )
    return file


def _is_current_export(file: Path, checkpoint_sha256: str, calibration_sha256: str) -> bool:
    """Return whether `file` is a verified export of this checkpoint with this calibration."""
    record = read_record(file.parent)
    known = record.get("files", {}).get(file.name, {})
    if not file.exists() or record.get("checkpoint_sha256") != checkpoint_sha256:
        return False
    summary = summarize(file)
    return bool(known.get("sha256") == summary.sha256 and (summary.calibration_sha256 or "") == calibration_sha256)


def _evaluate(
    models: Sequence[Model], suite: SuiteConfig, config: MeasureConfig, progress: Callable[[str], None]
) -> list[Path]:
    folder = output_dir(config.folder / "evaluation")
    paths = [folder / f"{model.name}.{suite.name}.json" for model in models]
    run = RunConfig(
        out=folder,
        batch_size=config.batch_size,
        workers=RunConfig(out=folder).workers if config.workers is None else config.workers,
    )
    reference, opened = models[0], open_suite(suite, models[0].spec)
    wanted = [
        describe(model, None if model is reference else reference, opened, suite, run.batch_size, "1/1")
        for model in models
    ]
    if all(_has_result(path, skeleton) for path, skeleton in zip(paths, wanted, strict=True)):
        log.info("the results in %s are there from an earlier run", folder)
        return paths

    def show(done: int, total: int) -> None:
        progress(f"evaluating: {done} of {total} blocks of {run.batch_size} images")

    for path, result in zip(paths, evaluate(models, suite, run, reference=reference, progress=show), strict=True):
        write_result(path, result)
    return paths


def _has_result(path: Path, skeleton: Result) -> bool:
    """Return whether `path` holds the complete result of the evaluation `skeleton`."""
    try:
        found = read_result(path)
        cells = {name: {key: cell[key] for key in cell if key != "counts"} for name, cell in found["cells"].items()}
        whole = is_whole(found)
    except (DataError, KeyError, TypeError, AttributeError):
        return False
    same = all(found.get(key) == skeleton[key] for key in skeleton if key != "cells")
    return whole and same and cells == skeleton["cells"]
