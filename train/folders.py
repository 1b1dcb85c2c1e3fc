"""Open image files as a dataset: class folders with or without a validation part, and lists."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from timm.utils.misc import natural_key

from runtime.errors import DataError
from runtime.system.image_sources import SUFFIXES, class_folders, find_images, is_image_name, unread_format
from train.config import DataConfig
from train.data import ImageData, Origin, by_class
from train.file_lists import is_list, read_list
from train.split import Split, recorded_split, split_by_class

__all__ = ["image_files", "image_folder"]

log = logging.getLogger(__name__)

_VAL_NAMES = ("val", "validation", "valid")
_EXPECTED = (
    "CLASS/IMAGE files, train/CLASS/IMAGE and val/CLASS/IMAGE files, or a .csv or .jsonl file of paths and labels"
)

_Files = dict[str, list[str]]


def image_folder(root: Path) -> ImageData:
    """Open the images of a folder with the default settings, see `image_files`."""
    return image_files(DataConfig(root=root))


def image_files(config: DataConfig, *, seed: int = 0, record: Path | None = None) -> ImageData:
    """Open the image files of `config.root` and `config.val`.

    Without validation images, a share of each class is used for validation.

    Args:
        config: settings of the data.
        seed: seed of the split.
        record: `split.csv` of the run that resumes. If it exists, the split is read from it.

    Raises:
        DataError: see `by_class`; also if a file or folder is missing or cannot be read.
    """
    root = config.root
    assert root is not None
    val: _Files | None
    if is_list(root):
        place, name = root, root.stem
        train, val = _listed(root)
        val_place = Path(f"{root} (validation part)")
    else:
        name = root.resolve().name
        place, found = _parts(root)
        train = _labeled_files(place)
        val = None if found is None or config.val is not None else _labeled_files(found)
        val_place = Path(f"{place} (validation part)") if found is None else found
    if config.val is not None:
        val_place = config.val
        val = _validation_files(config.val)
    split: Split | None = None
    if val is None:
        if record is not None and record.is_file():
            split = recorded_split(record, train)
        else:
            split = _split(place, train, config.val_share, seed)
        train, val = ({label: list(files) for label, files in part.items()} for part in (split.train, split.val))
    elif is_list(root) or config.val is not None:
        split = Split(train, val)
    data = by_class(Origin(name, place, val_place), train, val, list, {} if is_list(root) else _unread(place, train))
    return dataclasses.replace(data, split=split)


def _parts(root: Path) -> tuple[Path, Path | None]:
    """Return the folder of the training images, and that of the validation images if it exists.

    Raises:
        DataError: the folder has neither `train` nor class folders.
    """
    if not root.is_dir():
        found = "a file" if root.exists() else "no such folder"
        raise DataError(f"{root}: {found}; expected a folder with {_EXPECTED}")
    val = next((root / name for name in _VAL_NAMES if (root / name).is_dir()), None)
    if (root / "train").is_dir():
        if val is None and (root / "test").is_dir():
            log.info("%s is not used; --val-data %s validates on it", root / "test", root / "test")
        return root / "train", val
    names = sorted(entry.name for entry in root.iterdir())
    if val is not None or not any((root / name).is_dir() for name in names):
        images = sum(map(is_image_name, names))
        found = f"{images} images without class folders" if images else ", ".join(names[:8]) or "an empty folder"
        raise DataError(
            f"{root}: found {found}; expected {_EXPECTED}" + (f" ({root / 'train'} is missing)" if val else "")
        )
    return root, None


def _listed(path: Path) -> tuple[_Files, _Files | None]:
    """Return the training images of a list, and its validation images if it has any."""
    found = read_list(path)
    if found.unused:
        log.info("%s: %d images of the split test are not used", path, found.unused)
    if not found.train:
        raise DataError(f"{path} has no training images; expected lines of path,label or path,label,train")
    suffixes = {Path(file).suffix for files in found.train.values() for file in files}
    if unread := sorted(suffix for suffix in suffixes if suffix.lower() not in SUFFIXES):
        raise DataError(f"{path} lists files that are not images ({', '.join(unread)}); expected {', '.join(SUFFIXES)}")
    return found.train, found.val or None


def _validation_files(path: Path) -> _Files:
    if is_list(path):
        found = read_list(path)
        return {name: found.train.get(name, []) + found.val.get(name, []) for name in {**found.train, **found.val}}
    if not path.is_dir():
        raise DataError(
            f"--val-data {path}: no such folder or list; expected a folder with CLASS/IMAGE files, or a "
            ".csv or .jsonl file"
        )
    return _labeled_files(path)


def _split(place: Path, files: _Files, share: float, seed: int) -> Split:
    """Divide files that have no validation part, and report it."""
    if sum(map(bool, files.values())) < 2:
        _check_depth(place, files)
        return Split(files, {})  # `by_class` reports it
    split = split_by_class(files, share, seed)
    count = sum(map(len, split.val.values()))
    log.info(
        "%s has no validation images: using %d of %d images for validation, %.0f%% of each class (seed %d)",
        place,
        count,
        sum(map(len, files.values())),
        100 * share,
        seed,
    )
    return split


def _check_depth(place: Path, files: Mapping[str, Sequence[str]]) -> None:
    """Raise DataError if the class folders are one level deeper."""
    for name in files:
        inner = [entry for entry in (place / name).iterdir() if entry.is_dir()] if (place / name).is_dir() else []
        if len(inner) > 1:
            raise DataError(
                f"{place} has one folder, {name}, with {len(inner)} folders in it; expected one folder per class",
                fix=f"use --data {place / name}",
            )


def _labeled_files(folder: Path) -> _Files:
    """Return the image files by class folder, in natural order, as timm sorts them."""
    found = find_images(folder, class_folders(folder))
    return {name: sorted((str(folder / file) for file in files), key=natural_key) for name, files in found.items()}


def _unread(place: Path, files: _Files) -> dict[str, Counter[str]]:
    """Return, for classes without images, the number of files of formats that are not decoded."""
    return {
        name: Counter(unread_format(file) for *_, found in os.walk(place / name) for file in found)
        for name, images in files.items()
        if not images
    }
