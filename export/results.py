"""Find the evaluations of a checkpoint among result files."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.record import read_record
from runtime.errors import DataError
from runtime.evaluate.cells import CLEAN, IMAGES
from runtime.evaluate.results import FORMAT, check_result, is_whole
from runtime.spec import ModelSpec
from runtime.system.files import no_such

__all__ = ["Evaluation", "find_results"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The figures of one result file."""

    file: Path
    """The result file."""
    suite: str
    """The test set's kind, from `runtime.evaluate.suites.SUITES`."""
    dataset: str
    """Name of the folder of images, without the rest of its path."""
    images: int
    """Images per cell."""
    settings: dict[str, Any]
    """Settings of the evaluation: `limit`, `seed`, …"""
    top1: float | None
    """Top-1 accuracy on images without corruptions, 0 to 1."""
    top1_interval: tuple[float, float] | None
    """Its 95% interval."""
    mean_error: float | None
    """Mean error over corruptions and severities, 0 to 1."""
    mean_error_interval: tuple[float, float] | None
    """Its 95% interval."""
    mce: float | None
    """mCE in percent of AlexNet's error; only for ImageNet's classes."""
    mce_interval: tuple[float, float] | None
    """Its 95% interval."""


def find_results(checkpoint: Path, spec: ModelSpec, given: Sequence[str | Path] = ()) -> tuple[Evaluation, ...]:
    """Return the evaluations of a checkpoint, or of the FP32 ONNX file that was exported from it.

    Args:
        checkpoint: the checkpoint.
        spec: its spec, with its hash and the exported route.
        given: result files, or folders of them (default: JSON files next to the checkpoint, or in a
            folder next to it).

    Raises:
        DataError: a file of `given` does not exist, or none of them is a result of this checkpoint.
    """
    hashes = {spec.checkpoint_sha256, *_exported(checkpoint.parent, spec.checkpoint_sha256)}
    found: dict[tuple[str, str], Evaluation] = {}
    others = []
    for path in _files(checkpoint.parent, given):
        result = _read(path)
        if result is None:
            continue
        model = result["model"]
        if model.get("sha256") not in hashes or model.get("route", spec.route) != spec.route:
            others.append(f"{path} ({model['name']})")
            continue
        evaluation = _evaluation(path, result)
        earlier = found.setdefault((evaluation.suite, evaluation.dataset), evaluation)
        if earlier.images < evaluation.images:
            found[evaluation.suite, evaluation.dataset] = evaluation
    if given and not found:
        names = ", ".join(others) or "no complete evaluations"
        raise DataError(
            f"--results: found {names}; expected evaluations of {checkpoint}",
            fix=f"evaluate it: advprop eval {checkpoint} --suite corruptions --data DIR",
        )
    if given and others:
        log.warning("not in the card, because they are results of other models: %s", ", ".join(others))
    return tuple(found.values())


def _files(run: Path, given: Sequence[str | Path]) -> Iterator[Path]:
    if not given:
        yield from (*sorted(run.glob("*.json")), *sorted(run.glob("*/*.json")))
    for path in map(Path, given):
        if path.is_dir():
            yield from sorted(path.glob("*.json"))
        elif path.is_file():
            yield path
        else:
            raise DataError(no_such("result file or folder", path))


def _read(path: Path) -> dict[str, Any] | None:
    """Return a complete evaluation; None for other files."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            return None
        result = check_result(content, path)
    except (OSError, ValueError, RecursionError) as error:  # DataError is a ValueError
        log.warning("skipped %s: %s", path, error)
        return None
    return result if is_whole(result) else None


def _exported(folder: Path, checkpoint_sha256: str) -> set[str]:
    """Return the hashes of the FP32 files that `export.json` records for this checkpoint."""
    record = read_record(folder)
    if record.get("checkpoint_sha256") != checkpoint_sha256:
        return set()
    entry = record["files"].get("model.onnx")
    return {entry["sha256"]} if isinstance(entry, dict) and isinstance(entry.get("sha256"), str) else set()


def _evaluation(path: Path, result: dict[str, Any]) -> Evaluation:
    metrics, cells = result["metrics"], result["metrics"]["cells"]
    clean = cells.get(CLEAN) or cells.get(IMAGES) or {}
    mean, mce = metrics.get("mean_error", {}), metrics.get("mce_alexnet", {})
    return Evaluation(
        file=path,
        suite=result["suite"],
        dataset=_dataset(Path(result["data"]["path"])),
        images=max(cell["images"] for cell in cells.values()),
        settings=result["settings"],
        top1=clean.get("top1"),
        top1_interval=clean.get("top1_interval"),
        mean_error=mean.get("value"),
        mean_error_interval=mean.get("interval"),
        mce=mce.get("value"),
        mce_interval=mce.get("interval"),
    )


def _dataset(folder: Path) -> str:
    """Return `photos/val` for /home/me/photos/val: names of splits alone say little."""
    splits = ("train", "val", "valid", "validation", "test")
    return f"{folder.parent.name}/{folder.name}" if folder.name in splits and folder.parent.name else folder.name
