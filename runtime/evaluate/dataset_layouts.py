"""How each test set lies on disk, what its labels mean, and whether its images may be resized."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from runtime.errors import ConfigError, DataError
from runtime.evaluate.cells import CLEAN, IMAGES, Cell, Opening, SuiteConfig
from runtime.evaluate.corruptions import CORRUPTIONS, EXTRAS
from runtime.evaluate.images import ArrayFile, LabeledImages, class_folders, image_files, open_array
from runtime.evaluate.labels import among, by_cifar_number, by_imagenet_number

__all__ = ["labeled_folders", "made_here", "numbered_folders", "released_arrays", "released_folders", "two_hundred"]

log = logging.getLogger(__name__)

SEVERITIES = (1, 2, 3, 4, 5)
_KNOWN = (*CORRUPTIONS, *EXTRAS)
_GROUPS = ("noise", "blur", "weather", "digital", "extra")
"""What the tar files of ImageNet-C unpack to, where each is unpacked into a folder of its own."""


def labeled_folders(resize: str) -> Callable[[Opening], list[Cell]]:
    """CLASS/IMAGE, resized as the model wants it (`fit`) or not at all (`none`)."""

    def cells(opening: Opening) -> list[Cell]:
        images = opening.by_class(opening.config.data)
        return [*opening.clean(), Cell(id=IMAGES, images=images, resize=resize)]

    return cells


def numbered_folders(opening: Opening) -> list[Cell]:
    """ImageNet-V2: folders called 0 to 999."""
    root = opening.config.data
    images = opening.folder(root, lambda names: by_imagenet_number(names, opening.spec, str(root)))
    return [*opening.clean(), Cell(id=IMAGES, images=images, resize="fit")]


def two_hundred(chosen: Mapping[str, int]) -> Callable[[Opening], list[Cell]]:
    """ImageNet-A or -R: which of 200 classes, here and of the clean images beside them."""

    def cells(opening: Opening) -> list[Cell]:
        found: list[Cell] = []
        for cell, root in ((CLEAN, opening.config.clean), (IMAGES, opening.config.data)):
            if root is not None and opening.config.wants(cell):
                labels, opening.classes = among(class_folders(root), chosen, opening.spec, str(root))
                images = opening.limited(image_files(root, labels))
                found.append(Cell(id=cell, images=images, resize="fit"))
        opening.skipped |= set(class_folders(opening.config.data)) - set(chosen)
        return found

    return cells


def made_here(opening: Opening) -> list[Cell]:
    """CLASS/IMAGE, as they are and under corruptions that are made while they are evaluated."""
    if opening.config.clean is not None:
        raise ConfigError("corruptions are made of --data, which is the clean set too; leave --clean out")
    images = opening.by_class(opening.config.data)
    clean = Cell(id=CLEAN, images=images, resize="fit")
    return [clean, *(replace(clean, id=f"{name}/{level}", corruption=(name, level)) for name, level in _grid())]


def released_folders(opening: Opening) -> list[Cell]:
    """ImageNet-C: CORRUPTION/SEVERITY/WNID, 224 px as they are; resizing again would undo part of the corruption."""
    root = opening.config.data
    homes = {
        name: folder / name
        for folder in (root, *(root / group for group in _GROUPS))
        for name in _KNOWN
        if (folder / name).is_dir()
    }
    cells = opening.clean()
    for name, level in _grid(homes):
        folder = homes[name] / str(level)
        if opening.config.wants(f"{name}/{level}") and folder.is_dir():
            cells.append(Cell(id=f"{name}/{level}", images=opening.by_class(folder), resize="none"))
    _tell_found(opening.config, cells, "CORRUPTION/SEVERITY/WNID folders, such as fog/3/n01440764")
    return cells


def released_arrays(opening: Opening) -> list[Cell]:
    """CIFAR-10-C: CORRUPTION.npy, one fifth of its rows a severity, and labels.npy."""
    root = opening.config.data
    found = [name for name in _KNOWN if (root / f"{name}.npy").is_file()]
    cells = opening.clean()
    for name in found:
        if not any(opening.config.wants(f"{name}/{level}") for level in SEVERITIES):
            continue
        path = root / f"{name}.npy"
        labels = _array_labels(root / "labels.npy", path, len(open_array(path)))
        places = by_cifar_number(labels, opening.spec, str(root / "labels.npy"))
        rows = len(labels) // len(SEVERITIES)
        for level in SEVERITIES:
            numbers = range((level - 1) * rows, level * rows)
            images = LabeledImages(
                ArrayFile(path), tuple(str(row) for row in numbers), tuple(places[labels[row]] for row in numbers)
            )
            cells.append(Cell(id=f"{name}/{level}", images=_same_rows(opening, images, rows), resize="fit"))
    _tell_found(opening.config, cells, "CORRUPTION.npy files, such as fog.npy, and labels.npy")
    return cells


def _same_rows(opening: Opening, images: LabeledImages, rows: int) -> LabeledImages:
    """A limit draws the same images at every severity: by their number within it."""
    if opening.config.limit is None:
        return images
    first = int(images.names[0])
    within = replace(images, names=tuple(str(row) for row in range(rows))).limited(
        opening.config.limit, opening.config.seed
    )
    return replace(within, names=tuple(str(first + int(name)) for name in within.names))


def _array_labels(path: Path, images: Path, count: int) -> list[int]:
    if not path.is_file():
        raise DataError(f"no such file: {path}; CIFAR-10-C has its labels there")
    try:
        labels = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} is not a whole .npy file ({error}); copy or download it again") from error
    if labels.shape != (count,) or count == 0 or count % len(SEVERITIES) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path}: expected a whole number for each of the {count} images of {images.name}, a fifth of them a "
            f"severity; found {labels.dtype} {labels.shape}"
        )
    return [int(label) for label in labels]


def _grid(names: Iterable[str] = _KNOWN) -> list[tuple[str, int]]:
    return [(name, level) for name in _KNOWN if name in names for level in SEVERITIES]


def _tell_found(config: SuiteConfig, cells: list[Cell], expected: str) -> None:
    root, found = config.data, {cell.id for cell in cells} - {CLEAN}
    if not found and not config.only:
        there = ", ".join(sorted(entry.name for entry in root.iterdir())[:6]) if root.is_dir() else "no such folder"
        raise DataError(f"{root}: expected {expected}; found {there or 'an empty folder'}")
    grid = {f"{name}/{level}" for name in CORRUPTIONS for level in SEVERITIES}
    if not config.only and not grid <= found:
        log.warning(
            "%s has %d of the %d cells of the fifteen corruptions; mCE needs all", root, len(grid & found), len(grid)
        )
