"""Convert ONNX files: those of other tools to advprop files, and float32 files to FP16 or BF16."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from calib.images import calibration_set
from calib.precision import Decision, deciding_tensors, overflows, to_reduced
from calib.prepare import read_float_model
from export.record import save_decisions
from export.reduce import reduce_precision
from export.verify import TOLERANCE, Parity, require
from runtime.errors import ConfigError
from runtime.graph.collect import collect
from runtime.graph.convert import Converted, convert_classifier
from runtime.graph.foreign import ForeignOptions
from runtime.graph.model import run_batches, save_onnx
from runtime.graph.read import read_onnx
from runtime.graph.structure import set_metadata, spec_of
from runtime.spec import METADATA_KEY, ModelSpec
from runtime.system.files import output_dir

__all__ = ["PRECISIONS", "ConvertedFile", "convert_file"]

log = logging.getLogger(__name__)

PRECISIONS = ("fp32", "fp16", "bf16")
"""Precisions of a converted file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedFile:
    """The result of `convert_file`."""

    path: Path
    """The file that was written."""
    spec: ModelSpec
    """The spec in the file."""
    notes: tuple[str, ...]
    """What was changed in the graph, one line each."""
    kept_fp32: tuple[Decision, ...] = ()
    """Nodes that stay in FP32."""
    parity: Parity | None = None
    """Comparison with the float32 graph on images; None for FP32 or without images."""


def convert_file(
    source: Path,
    target: Path,
    options: ForeignOptions,
    *,
    precision: str = "fp32",
    data: Path | None = None,
    images: int = 64,
) -> ConvertedFile:
    """Convert the ONNX file `source` and write `target`.

    Args:
        source: a float32 ONNX classifier of another tool; for a reduced precision, also one of
            advprop.
        target: the file to write, NAME.onnx. `NAME.json` lists the nodes that stay in FP32, if
            there are images.
        options: what `source` does not contain.
        precision: one of PRECISIONS.
        data: images on which a reduced precision is compared with FP32. Nodes that overflow or lose
            accuracy on them stay in FP32.
        images: maximum number of these images.

    Raises:
        ConfigError, DataError, ModelFileError: see `convert_classifier` and `calibration_set`.
        VerificationError: the reduced precision differs too much from FP32. The file is kept.
    """
    if target.suffix != ".onnx" or target.resolve() == source.resolve():
        raise ConfigError(f"the output path must be a new file NAME.onnx; found {target}")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be {', '.join(PRECISIONS)}; found {precision!r}")
    converted = _converted(source, options, precision)
    output_dir(target.parent)
    if precision == "fp32":
        save_onnx(converted.model, target)
        return ConvertedFile(path=target, spec=converted.spec, notes=converted.notes)
    if data is None:
        return _reduce_unseen(converted, target, precision)
    return _reduce_on_images(converted, target, precision, data, images)


def _converted(source: Path, options: ForeignOptions, precision: str) -> Converted:
    """Return the graph and spec of a file; a float32 file of advprop needs no conversion."""
    if precision == "fp32" or spec_of(read_onnx(source), str(source)) is None:
        return convert_classifier(source, options)
    model, _ = read_float_model(source, None if options == ForeignOptions() else options)
    spec = spec_of(model, str(source))
    assert spec is not None
    return Converted(model, spec, ())


def _reduce_unseen(converted: Converted, target: Path, precision: str) -> ConvertedFile:
    """Reduce the precision of all nodes, except those whose weights overflow."""
    kept = overflows(converted.model, {}) if precision == "fp16" else []
    log.warning(
        "the %s file was not compared with FP32, and its tensors can overflow; pass images with --data to check it",
        precision.upper(),
    )
    _save(to_reduced(converted.model, precision, kept), converted.spec, target)
    return ConvertedFile(path=target, spec=converted.spec, notes=converted.notes, kept_fp32=tuple(kept))


def _reduce_on_images(converted: Converted, target: Path, precision: str, data: Path, images: int) -> ConvertedFile:
    chosen = calibration_set(data, images, converted.spec.preprocessing)
    batches = functools.partial(chosen.batches, converted.spec.preprocessing)
    found = collect(converted.model, batches(), tensors=deciding_tensors(converted.model))
    amax = dict(found.amax)
    reduced = reduce_precision(
        converted.model,
        precision,
        amax=amax,
        logits_NK=np.asarray(found.output, np.float32),
        batches=batches,
        run=lambda graph: run_batches(graph, batches()),
    )
    _save(reduced.model, converted.spec, target)
    save_decisions(target.with_suffix(".json"), reduced.decisions, amax, reduced.parity)
    require(reduced.parity, TOLERANCE[precision], str(target), "the float32 graph")
    return ConvertedFile(
        path=target,
        spec=converted.spec,
        notes=converted.notes,
        kept_fp32=reduced.decisions,
        parity=reduced.parity,
    )


def _save(model: onnx.ModelProto, spec: ModelSpec, target: Path) -> None:
    set_metadata(model, {METADATA_KEY: spec.to_json()})
    save_onnx(model, target)
