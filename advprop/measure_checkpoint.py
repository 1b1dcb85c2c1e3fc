"""`measure_checkpoint`: checkpoint → files of several precisions → results of their evaluation, for a report."""

from __future__ import annotations

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
from runtime.evaluate.results import Result, describe, is_whole, read_result, write_result
from runtime.evaluate.run import RunConfig, evaluate
from runtime.evaluate.suites import open_suite
from runtime.graph.summary import summarize
from runtime.system.files import output_dir

__all__ = ["MeasureConfig", "measure_checkpoint"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureConfig:
    """What is made and measured."""

    precisions: tuple[str, ...]
    """Of PRECISIONS: the ONNX files to export."""
    suite: SuiteConfig
    folder: Path
    """Where exported files and results go, and where a run that was stopped finds them again."""
    calib_data: Path | None = None
    """Images to calibrate INT8 on; None: those of the suite's folder that are not evaluated."""
    calib_images: int = 256
    """The most of them."""
    workers: int | None = None
    """Processes that decode and corrupt; None: cores − 1."""
    batch_size: int = 8
    device: str = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        for precision in self.precisions:
            if precision not in PRECISIONS:
                hint = nearest(precision, PRECISIONS)
                raise ConfigError(f"precisions are {', '.join(PRECISIONS)}; found {precision!r}. {hint}".rstrip(". "))
        if not self.precisions or len(set(self.precisions)) < len(self.precisions):
            raise ConfigError(f"name each precision once, at least one; found {','.join(self.precisions) or 'none'}")
        if self.calib_data is not None and "int8" not in self.precisions:
            raise ConfigError("calibration images are for INT8, which is not among the precisions")


def measure_checkpoint(
    checkpoint: Path, config: MeasureConfig, progress: Callable[[str], None] | None = None
) -> tuple[list[Path], str]:
    """Exports a checkpoint, and evaluates it beside its files; what an earlier call finished is not done again.

    Args:
        checkpoint: one of ours. It is evaluated too, and is what the files are compared with, image by image.
        config: what to make.
        progress: told what is being done.

    Returns:
        The results' files, and in words which images were calibrated on; "" where none were.

    Raises:
        AdvPropError: see `export_checkpoint`, `evaluate` and `split`.
    """
    progress = progress or log.debug
    output_dir(config.folder)
    progress("reading the checkpoint")
    reference = load_model(checkpoint, device=config.device, checkpoint_loader=load_predictor)
    if config.suite.name == "corruptions":
        opened = open_suite(config.suite, reference.spec)
        opened.probe({cell.id for cell in opened.cells}, reference.spec.preprocessing)  # not after the exports
    parts, suite = None, config.suite
    if "int8" in config.precisions:
        progress("choosing calibration images")
        parts = split(suite, reference.spec, config.calib_data, config.calib_images)
        suite = parts.suite
    files = [_exported(checkpoint, reference, precision, config, parts, progress) for precision in config.precisions]
    models = [reference, *(load_model(file, device=config.device, threads=config.threads) for file in files)]
    return _evaluated(models, suite, config, progress), parts.words if parts else ""


def _exported(
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
    if _is_made(file, str(reference.facts["sha256"]), chosen.sha256 if chosen else ""):
        log.info("%s is there from an earlier run", file)
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


def _is_made(file: Path, checkpoint_sha256: str, calibration_sha256: str) -> bool:
    """Whether a file was exported of this very checkpoint, and verified; an INT8 one by these very images."""
    record = read_record(file.parent)
    known = record.get("files", {}).get(file.name, {})
    if not file.exists() or record.get("checkpoint_sha256") != checkpoint_sha256:
        return False
    summary = summarize(file)
    return bool(known.get("sha256") == summary.sha256 and (summary.calibration_sha256 or "") == calibration_sha256)


def _evaluated(
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
    if all(_is_result(path, skeleton) for path, skeleton in zip(paths, wanted, strict=True)):
        log.info("the results in %s are there from an earlier run", folder)
        return paths

    def show(done: int, total: int) -> None:
        progress(f"evaluating: {done} of {total} blocks of {run.batch_size} images")

    for path, result in zip(paths, evaluate(models, suite, run, reference=reference, progress=show), strict=True):
        write_result(path, result)
    return paths


def _is_result(path: Path, skeleton: Result) -> bool:
    """Whether the whole result of this very evaluation is there."""
    try:
        found = read_result(path)
        cells = {name: {key: cell[key] for key in cell if key != "counts"} for name, cell in found["cells"].items()}
        whole = is_whole(found)
    except (DataError, KeyError, TypeError, AttributeError):
        return False
    same = all(found.get(key) == skeleton[key] for key in skeleton if key != "cells")
    return whole and same and cells == skeleton["cells"]
