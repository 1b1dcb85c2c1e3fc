"""Damaged and hostile files of every kind that advprop reads: only its own errors are allowed.

A case is determined by its kind and seed. `tests/test_fuzz.py` runs a few cases of each kind, and
`benchmarks/fuzz.py` many.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from runtime.errors import AdvPropError
from tests.support import fuzz_datasets as data
from tests.support import fuzz_documents as documents
from tests.support import fuzz_models as models

__all__ = ["KINDS", "NATIVE", "Kind", "run_case"]


class Kind(NamedTuple):
    """One kind of input."""

    make: Callable[[Random], Any]
    """Returns a damaged input."""
    read: Callable[[Any, Path], object]
    """Reads it, with a folder for files."""
    share: int = 1
    """Relative number of cases in a long run: more for kinds that are read quickly."""


def run_case(kind: str, seed: int, folder: Path) -> str:
    """Run a case. Return the type of our error, or `passed`; other errors are not caught."""
    make, read, _ = {**KINDS, **NATIVE}[kind]
    made = make(Random(f"{kind} {seed}"))
    try:
        read(made, folder)
    except AdvPropError as error:
        return type(error).__name__
    return "passed"


KINDS: dict[str, Kind] = {
    "ONNX": Kind(models.any_onnx, models.read_model, 4),
    "ONNX in ONNX Runtime": Kind(models.any_onnx, models.load_and_run, 2),
    "specs": Kind(models.make_spec, models.read_spec, 30),
    "sidecars": Kind(models.make_sidecar, models.read_sidecar_bytes, 2),
    "plans": Kind(models.make_plan, models.read_plan, 2),
    "options": Kind(models.make_options, models.build_with, 2),
    "images": Kind(data.make_image, data.read_image, 30),
    "arrays": Kind(data.make_array, data.read_array, 8),
    "tar files": Kind(data.make_archive, data.read_archive, 4),
    "results": Kind(documents.make_results, documents.read_results, 4),
    "progress logs": Kind(documents.make_progress_log, documents.read_progress_log, 4),
    "calib.json": Kind(documents.make_manifest, documents.read_manifest, 8),
    "config.toml": Kind(documents.make_config, documents.read_config, 8),
    "checkpoints": Kind(documents.make_checkpoint, documents.read_checkpoint, 1),
}
"""Kind of input → how it is damaged and read."""

NATIVE = {"ONNX in TensorRT-RTX": Kind(models.any_onnx, models.build_engine)}
"""Kinds that start a process for each case."""
