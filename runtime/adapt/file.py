"""Adapt an ONNX file to a folder of field images."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.adapt.adapt import Adaptation, AdaptConfig, CleanImages, adapt
from runtime.adapt.record import adaptation_report, metadata_record
from runtime.errors import ConfigError, DataError, ModelFileError, SpecError
from runtime.graph.model import save_onnx
from runtime.graph.read import load_onnx, sha256_onnx
from runtime.graph.structure import set_metadata
from runtime.graph.summary import ADAPTATION_KEY, summarize
from runtime.preprocessing import decode_and_fit
from runtime.spec import ModelSpec, Preprocessing
from runtime.system.files import output_dir, write_text
from runtime.system.image_sources import open_source, spread

__all__ = ["AdaptedFile", "adapt_file", "adaptable_spec"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedFile:
    """The result of `adapt_file`."""

    adaptation: Adaptation
    """The adapted model, the verdict and its reasons."""
    path: Path | None
    """The file that was written; None if it is not expected to be better."""
    report: dict[str, Any]
    """Content of the report `NAME.json`."""


def adapt_file(
    source: str | PathLike[str],
    data: str | PathLike[str],
    target: str | PathLike[str],
    config: AdaptConfig | None = None,
    *,
    clean: CleanImages | None = None,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> AdaptedFile:
    """Adapt the float32 ONNX file `source` to field images, and write `target`.

    Also writes the report `NAME.json` next to it. Nothing is written if the adapted model is not
    expected to be better, see `Adaptation.verdict`.

    Args:
        source: an ONNX classifier of `advprop export` or `advprop convert`.
        data: unlabeled images of the place where the model runs: a folder, a tar file or an array.
        target: the file to write, NAME.onnx.
        config: settings (default: `AdaptConfig()`).
        clean: see `adapt`.
        force: write the files in any case.
        progress: called with the name of each stage.

    Raises:
        AdvPropError: see `adapt`.
        ConfigError: `target` cannot be used.
        DataError: there are no usable images.
        OutputError: `target` cannot be written.
    """
    source, data, target, config = Path(source), Path(data), Path(target), config or AdaptConfig()
    if target.suffix != ".onnx" or target.resolve() == source.resolve():
        raise ConfigError(f"the output path must be a new file NAME.onnx; found {target}")
    spec = adaptable_spec(source)
    images_NHWC, images_sha256 = _field_images(data, config.images, spec.preprocessing)
    model = load_onnx(source)
    try:
        result = adapt(model, images_NHWC, config, clean=clean, progress=progress)
    except ModelFileError as error:
        raise ModelFileError(f"{source}: {error.message}", fix=error.fix) from error
    record = metadata_record(result, config, sha256_onnx(source), images_sha256)
    report = adaptation_report(result, record)
    if not (result.verdict.adapts or force):
        return AdaptedFile(adaptation=result, path=None, report=report)
    set_metadata(result.model, {ADAPTATION_KEY: json.dumps(record, separators=(",", ":"))})
    output_dir(target.parent)
    target.with_suffix(".json").unlink(missing_ok=True)  # a report must describe the file next to it
    save_onnx(result.model, target)
    write_text(target.with_suffix(".json"), json.dumps(report, indent=1) + "\n")
    return AdaptedFile(adaptation=result, path=target, report=report)


def adaptable_spec(path: Path) -> ModelSpec:
    """Return the spec of a float32 ONNX file.

    Raises:
        ModelFileError: the file does not compute in float32, or is not an ONNX classifier.
        SpecError: the file has no spec.
    """
    summary = summarize(path)
    if summary.precision != "fp32":
        raise ModelFileError(
            f"{path} computes in {', '.join(summary.weights)}; expected a float32 file",
            fix="adapt the float32 file (model.onnx), and reduce the precision of the adapted file",
        )
    if summary.spec is None:
        raise SpecError(f"{path} has no advprop.spec", fix="export the model, or describe it with advprop convert")
    return summary.spec


def _field_images(data: Path, count: int, spec: Preprocessing) -> tuple[NDArray[np.uint8], str]:
    """Return up to `count` images, evenly spaced over the sorted names, and a hash of their pixels."""
    fitted = []
    with open_source(data) as reader:
        for name in spread(reader.names, count):
            try:
                fitted.append(decode_and_fit(reader.read(name), spec, reader.describe(name)))
            except DataError as error:
                log.warning("skipped %s: %s", name, error)
    if not fitted:
        raise DataError(f"{data} has no images that can be used; pass images of the place where the model runs")
    images_NHWC = np.stack(fitted)
    return images_NHWC, hashlib.sha256(images_NHWC.tobytes()).hexdigest()
