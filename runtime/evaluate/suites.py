"""Open test sets by name: their layout on disk, their labels, and whether images may be resized."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from runtime.errors import ConfigError, DataError, nearest
from runtime.evaluate.cells import CLEAN, IMAGES, SEVERITIES, WNIDS, Cell, Opening, SuiteConfig
from runtime.evaluate.corruptions import CORRUPTIONS, EXTRAS, corrupt, table_for
from runtime.evaluate.images import LabeledImages, image_files
from runtime.evaluate.labels import IMAGENET_A, IMAGENET_R, among, by_cifar_number, by_imagenet_number
from runtime.spec import ModelSpec, Preprocessing
from runtime.system.image_sources import ArraySource, class_folders, open_array, read_array

__all__ = ["SUITES", "Suite", "open_suite"]

log = logging.getLogger(__name__)

_KNOWN = (*CORRUPTIONS, *EXTRAS)
_IMAGENET_C_GROUPS = ("noise", "blur", "weather", "digital", "extra")
"""Folders of the corruptions if each tar file of ImageNet-C was extracted into its own folder."""

_ANY_FOLDER = (CLEAN, "imagenet", "cifar10", "corruptions")
"""Suites that read any CLASS/IMAGE folder; the others are published test sets."""

Layout = Callable[[Opening], list[Cell]]
"""Lists the cells of a set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A test set, opened for models with the same classes and input size."""

    name: str
    cells: tuple[Cell, ...]
    """Cells, in the order of the report."""
    seed: int
    table: str | None
    """Table of severities for corruptions that the evaluation computes; None without them."""
    classes: tuple[int, ...] | None = None
    """The classes that compete; None for all classes of the model."""
    skipped: tuple[str, ...] = ()
    """Folders that match no class of the model."""
    named_by: str = WNIDS
    """What the class folders are named by: `WNIDS` or `NAMES` of `runtime.evaluate.cells`."""

    def probe(self, cells: Container[str], size: Preprocessing) -> None:
        """Compute each corruption of these cells once, to find a missing library before a long run.

        Args:
            cells: ids of cells.
            size: preprocessing of the network, with its input size.

        Raises:
            BackendUnavailable: a library or file that a corruption needs is missing.
        """
        for name in {cell.corruption[0] for cell in self.cells if cell.corruption and cell.id in cells}:
            assert self.table is not None
            corrupt(np.zeros((size.height, size.width, 3), np.uint8), name, 1, table=self.table)


def open_suite(config: SuiteConfig, spec: ModelSpec) -> Suite:
    """List the images of a test set for models with the classes and input size of `spec`.

    Raises:
        ConfigError: the suite or one of the selected cells does not exist.
        DataError: the folder has an unexpected layout, or no images of the model's classes.
        SpecError: the test set cannot be evaluated with the model's classes.
    """
    if config.name not in SUITES:
        hint = nearest(config.name, SUITES) or f"expected one of {', '.join(SUITES)}"
        raise ConfigError(f"unknown suite {config.name!r}; {hint}")
    opening = Opening(config, spec)
    cells = [cell for cell in SUITES[config.name](opening) if config.selects(cell.id)]
    if config.resize != "auto":
        # Images of --clean keep their preprocessing; clean images of `corruptions` follow --resize.
        kept = () if config.name == "corruptions" else (CLEAN,)
        cells = [cell if cell.id in kept else replace(cell, resize=config.resize) for cell in cells]
    if config.name not in _ANY_FOLDER:
        cells = [replace(cell, published=cell.id != CLEAN) for cell in cells]
    cells = [_with_field(cell, config) for cell in cells]
    found = {cell.id for cell in cells} | {cell.id.split("/")[0] for cell in cells}
    missing = [name for name in config.only if name not in found]
    if missing or not cells:
        raise ConfigError(f"{config.name} in {config.data} has no {', '.join(missing) or 'cells to evaluate'}")
    if opening.skipped:
        log.warning(
            "%s: %d folders match no class of the model and are skipped (%s, …)",
            config.data,
            len(opening.skipped),
            min(opening.skipped),
        )
    size = spec.preprocessing
    table = table_for(size.height, size.width) if config.table == "auto" else config.table
    return Suite(
        name=config.name,
        cells=tuple(cells),
        seed=config.seed,
        table=table if config.name == "corruptions" else None,
        classes=opening.classes,
        skipped=tuple(sorted(opening.skipped)),
        named_by=opening.named_by,
    )


def _with_field(cell: Cell, config: SuiteConfig) -> Cell:
    """Divide the images of a cell into those that models are adapted to and test images."""
    if not config.adapt:
        return cell
    count = max(config.adapt)
    if len(cell.images) < 2 * count:
        raise ConfigError(
            f"{cell.id} has {len(cell.images)} images; adapting to {count} of them needs at least {2 * count}, because "
            "the others are the test images. Use a smaller --adapt or a larger --limit"
        )
    field, images = cell.images.divided(count, config.seed)
    return replace(cell, images=images, field=field)


def _class_folders(resize: str) -> Layout:
    """Return the layout of sets with CLASS/IMAGE files."""

    def cells(opening: Opening) -> list[Cell]:
        images = opening.by_class(opening.config.data)
        return [*opening.clean(), Cell(id=IMAGES, images=images, resize=resize)]

    return cells


def _numbered_folders(opening: Opening) -> list[Cell]:
    """List ImageNet-V2, whose folders are named 0 to 999."""
    root = opening.config.data
    images = opening.folder(root, lambda names: by_imagenet_number(names, opening.spec, str(root)))
    return [*opening.clean(), Cell(id=IMAGES, images=images, resize="fit")]


def _imagenet_200(chosen: Mapping[str, int]) -> Layout:
    """Return the layout of ImageNet-A or -R. Only 200 classes compete, also on clean images."""

    def cells(opening: Opening) -> list[Cell]:
        found: list[Cell] = []
        for cell, root in ((CLEAN, opening.config.clean), (IMAGES, opening.config.data)):
            if root is not None and opening.config.selects(cell):
                labels, opening.classes = among(class_folders(root), chosen, opening.spec, str(root))
                images = opening.limited(image_files(root, labels))
                found.append(Cell(id=cell, images=images, resize="fit"))
        opening.skipped |= set(class_folders(opening.config.data)) - set(chosen)
        return found

    return cells


def _generated(opening: Opening) -> list[Cell]:
    """List CLASS/IMAGE files, clean and under corruptions computed during the evaluation."""
    if opening.config.clean is not None:
        raise ConfigError("the suite corruptions uses --data as its clean images too; remove --clean")
    images = opening.by_class(opening.config.data)
    clean = Cell(id=CLEAN, images=images, resize="fit")
    return [clean, *(replace(clean, id=f"{name}/{level}", corruption=(name, level)) for name, level in _all_cells())]


def _imagenet_c(opening: Opening) -> list[Cell]:
    """List ImageNet-C: CORRUPTION/SEVERITY/WNID.

    Its images have 224 pixels. Resizing them again would undo part of the corruption.
    """
    root = opening.config.data
    folders = {
        name: folder / name
        for folder in (root, *(root / group for group in _IMAGENET_C_GROUPS))
        for name in _KNOWN
        if (folder / name).is_dir()
    }
    cells = opening.clean()
    for name, level in _all_cells(folders):
        folder = folders[name] / str(level)
        if opening.config.selects(f"{name}/{level}") and folder.is_dir():
            cells.append(Cell(id=f"{name}/{level}", images=opening.by_class(folder), resize="none"))
    _check_found(opening.config, cells, "CORRUPTION/SEVERITY/WNID folders, such as fog/3/n01440764")
    return cells


def _cifar10_c(opening: Opening) -> list[Cell]:
    """List CIFAR-10-C: CORRUPTION.npy, with a fifth of the rows per severity, and labels.npy."""
    root = opening.config.data
    found = [name for name in _KNOWN if (root / f"{name}.npy").is_file()]
    cells = opening.clean()
    for name in found:
        if not any(opening.config.selects(f"{name}/{level}") for level in SEVERITIES):
            continue
        path = root / f"{name}.npy"
        labels = _array_labels(root / "labels.npy", path, len(open_array(path)))
        classes = by_cifar_number(labels, opening.spec, str(root / "labels.npy"))
        rows = len(labels) // len(SEVERITIES)
        for level in SEVERITIES:
            numbers = range((level - 1) * rows, level * rows)
            images = LabeledImages(
                ArraySource(path), tuple(str(row) for row in numbers), tuple(classes[labels[row]] for row in numbers)
            )
            cells.append(Cell(id=f"{name}/{level}", images=_limit_rows(opening, images, rows), resize="fit"))
    _check_found(opening.config, cells, "CORRUPTION.npy files, such as fog.npy, and labels.npy")
    return cells


def _limit_rows(opening: Opening, images: LabeledImages, rows: int) -> LabeledImages:
    """Apply the limit to one severity, and select the same image numbers in all severities."""
    if opening.config.limit is None:
        return images
    first = int(images.names[0])
    within = replace(images, names=tuple(str(row) for row in range(rows))).limited(
        opening.config.limit, opening.config.seed
    )
    return replace(within, names=tuple(str(first + int(name)) for name in within.names))


def _array_labels(path: Path, images: Path, count: int) -> list[int]:
    if not path.is_file():
        raise DataError(f"no such file: {path}; expected the labels of CIFAR-10-C there")
    labels = read_array(path)
    if labels.shape != (count,) or count == 0 or count % len(SEVERITIES) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path}: expected an integer for each of the {count} images of {images.name}, a fifth of them per "
            f"severity; found {labels.dtype} {labels.shape}"
        )
    return [int(label) for label in labels]


def _all_cells(names: Iterable[str] = _KNOWN) -> list[tuple[str, int]]:
    return [(name, level) for name in _KNOWN if name in names for level in SEVERITIES]


def _check_found(config: SuiteConfig, cells: list[Cell], expected: str) -> None:
    """Raise DataError if a set has no cells, and warn if corruptions are missing."""
    root, found = config.data, {cell.id for cell in cells} - {CLEAN}
    if not found and not config.only:
        entries = ", ".join(sorted(entry.name for entry in root.iterdir())[:6]) if root.is_dir() else "no such folder"
        raise DataError(f"{root}: expected {expected}; found {entries or 'an empty folder'}")
    grid = {f"{name}/{level}" for name in CORRUPTIONS for level in SEVERITIES}
    if not config.only and not grid <= found:
        log.warning(
            "%s has %d of the %d cells of the fifteen corruptions; mCE needs all of them",
            root,
            len(grid & found),
            len(grid),
        )


SUITES: dict[str, Layout] = {
    CLEAN: _class_folders("fit"),
    "imagenet": _class_folders("fit"),
    "imagenet-c": _imagenet_c,
    "imagenet-a": _imagenet_200(IMAGENET_A),
    "imagenet-r": _imagenet_200(IMAGENET_R),
    "imagenet-v2": _numbered_folders,
    "sketch": _class_folders("fit"),
    "stylized": _class_folders("none"),
    "cifar10": _class_folders("fit"),
    "cifar10-c": _cifar10_c,
    "corruptions": _generated,
}
"""Suite → its layout."""
