"""Divide image files into training and validation, and record the division in the run's folder."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.errors import DataError
from runtime.system.files import link_or_copy
from train.file_lists import TRAIN, VAL, read_list, write_list

__all__ = ["Split", "recorded_split", "split_by_class"]

log = logging.getLogger(__name__)

_Files = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Split:
    """Image files for training and for validation, by class."""

    train: _Files
    """Paths by class."""
    val: _Files
    """Paths by class."""

    def write(self, folder: Path) -> None:
        """Write `split.csv`, and the links `split/train/CLASS/IMAGE` and `split/val/CLASS/IMAGE`.

        The links make the two parts folders that every command reads.

        Raises:
            OutputError: the folder cannot be written.
        """
        parts = {TRAIN: self.train, VAL: self.val}
        write_list(folder / "split.csv", parts)
        links = folder / "split"
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(links)
        unsuitable = [name for name in self.train if not _is_folder_name(name)]
        if unsuitable:
            log.warning(
                "%s was not written, because these labels cannot be names of folders: %s",
                links,
                ", ".join(unsuitable[:5]),
            )
            return
        for part, classes in parts.items():
            for name, files in classes.items():
                _link_files(links / part / name, files)


def split_by_class(files: _Files, share: float, seed: int) -> Split:
    """Move a random share of each class to validation, at least one image and not all.

    The images of a class are drawn independently of the other classes.

    Args:
        files: paths by class.
        share: share of each class for validation, in (0, 1).
        seed: seed of the draw.

    Raises:
        DataError: no class has two images.
    """
    train, val = {}, {}
    for name, items in files.items():
        count = min(max(1, round(share * len(items))), len(items) - 1) if items else 0
        order = np.random.default_rng([seed, *name.encode()]).permutation(len(items))
        chosen = set(order[:count].tolist())
        train[name] = [item for index, item in enumerate(items) if index not in chosen]
        val[name] = [item for index, item in enumerate(items) if index in chosen]
    if not any(val.values()):
        raise DataError(
            "no class has two images, so none can be used for validation",
            fix="add images, or pass validation images with --val-data",
        )
    return Split(train, val)


def recorded_split(record: Path, files: _Files) -> Split:
    """Return the division that a run recorded, for the files that exist now.

    The folder of the images may have been moved. Files that the record does not contain are
    ignored, and reported.

    Args:
        record: the run's `split.csv`.
        files: paths by class.

    Raises:
        DataError: the record cannot be read.
    """
    recorded = read_list(record, check_files=False)
    present = {str(Path(file).absolute()): name for name, items in files.items() for file in items}
    before = [file for part in (recorded.train, recorded.val) for items in part.values() for file in items]
    old, new = (os.path.commonpath(list(map(os.path.dirname, paths))) if paths else "" for paths in (before, present))
    parts: list[dict[str, list[str]]] = []
    for part in (recorded.train, recorded.val):
        parts.append({name: [] for name in files})
        for name, items in part.items():
            for item in items:
                file = item if item in present else str(Path(new, os.path.relpath(item, old)))
                if present.get(file) == name:
                    parts[-1][name].append(file)
    known = sum(len(items) for part in parts for items in part.values())
    if known < len(present):
        log.warning("ignored %d images that are not in %s, the split of this run", len(present) - known, record)
    return Split(*parts)


def _is_folder_name(name: str) -> bool:
    return bool(name) and not name.startswith(".") and not any(character in name for character in '/\\:*?"<>|\0')


def _link_files(folder: Path, files: Sequence[str]) -> None:
    """Make links to files in a new folder. Files with the same name get a number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(files):
        target = folder / Path(file).name
        if os.path.lexists(target):
            target = folder / f"{number}-{target.name}"
        try:
            target.symlink_to(Path(file).absolute())
        except OSError:  # a file system without links
            link_or_copy(Path(file), target)
