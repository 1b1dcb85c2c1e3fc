"""The calibration set: which images, by their content, so that a result can be traced and repeated."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.errors import DataError
from runtime.files import sha256_file, write_text
from runtime.images import SUFFIXES, decode, fit_to_input, normalise, spread
from runtime.spec import Preprocessing

__all__ = ["BATCH", "CalibrationSet", "calibration_set"]

log = logging.getLogger(__name__)

FORMAT = "advprop.calib/1"
BATCH = 4
"""Images at once: few enough that a layer's output is still in the caches when it is counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSet:
    """Image files, in the order in which they are used."""

    folder: Path
    """Folder that the names are relative to."""
    names: tuple[str, ...]
    """Paths of the images."""
    hashes: tuple[str, ...]
    """SHA-256 of each file."""

    @property
    def sha256(self) -> str:
        """Hash of the set: of its files' hashes, in order."""
        return hashlib.sha256("".join(self.hashes).encode()).hexdigest()

    def batches(self, spec: Preprocessing, count: int = 0) -> Iterator[NDArray[np.float32]]:
        """Yields normalised images, float32 (N, 3, H, W), N up to BATCH.

        Args:
            spec: how an image becomes the network's input.
            count: of the set's images only so many, spread over it; 0 for all.
        """
        names = spread(self.names, count) if count else list(self.names)
        for start in range(0, len(names), BATCH):
            fitted = [fit_to_input(decode(self.folder / name), spec) for name in names[start : start + BATCH]]
            yield normalise(np.stack(fitted), spec)

    def save(self, path: Path) -> None:
        """Writes the manifest. Raises OutputError."""
        files = [{"name": name, "sha256": sha256} for name, sha256 in zip(self.names, self.hashes, strict=True)]
        content = {"format": FORMAT, "folder": str(self.folder), "sha256": self.sha256, "files": files}
        write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def calibration_set(source: Path, count: int = 256, spec: Preprocessing | None = None) -> CalibrationSet:
    """Chooses calibration images.

    Args:
        source: a folder, searched recursively, or the manifest (`calib.json`) of an earlier set.
        count: the most images to take from a folder, spread evenly over its sorted files.
        spec: the network's input; images that cannot be fitted to it are left out too.

    Raises:
        DataError: no images, or ones that are not those of the manifest.
    """
    if source.suffix == ".json":
        return _from_manifest(source)
    if not source.is_dir():
        raise DataError(
            f"{source}: no such folder of calibration images; give some hundred photographs such as the model will see"
        )
    paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    chosen = []
    for path in spread(paths, count):
        try:
            image = decode(path)
            if spec is not None:
                fit_to_input(image, spec)
        except DataError as error:
            log.warning("skipped %s: %s", path, error)
            continue
        chosen.append(path)
    if not chosen:
        raise DataError(f"{source}: found {len(paths)} image files, none of which can be decoded")
    return CalibrationSet(
        folder=source.resolve(),
        names=tuple(path.relative_to(source).as_posix() for path in chosen),
        hashes=tuple(sha256_file(path) for path in chosen),
    )


def _from_manifest(path: Path) -> CalibrationSet:
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise DataError(f"{path} has format {content['format']!r}, expected {FORMAT!r}")
        chosen = CalibrationSet(
            folder=Path(content["folder"]),
            names=tuple(str(entry["name"]) for entry in content["files"]),
            hashes=tuple(str(entry["sha256"]) for entry in content["files"]),
        )
    except FileNotFoundError as error:
        raise DataError(f"no such manifest of a calibration set: {path}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not the manifest of a calibration set ({error})") from error
    for name, sha256 in zip(chosen.names, chosen.hashes, strict=True):
        file = chosen.folder / name
        if not file.is_file():
            raise DataError(f"{path} names an image that is not there: {file}")
        if sha256_file(file) != sha256:
            raise DataError(f"{file} is not the image that {path} names: its content has changed; calibrate anew")
    return chosen
