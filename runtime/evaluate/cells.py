"""`SuiteConfig` selects the images of a test set; a `Cell` is a set of images with one result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runtime.errors import ConfigError, nearest
from runtime.evaluate.corruptions import CORRUPTIONS, EXTRAS, TABLES
from runtime.evaluate.images import LabeledImages, image_files
from runtime.evaluate.labels import by_folder
from runtime.spec import ModelSpec
from runtime.system.image_sources import class_folders

__all__ = ["CLEAN", "IMAGES", "NAMES", "RESIZE", "SEVERITIES", "WNIDS", "Cell", "Opening", "SuiteConfig"]

CLEAN = "clean"
"""Id of the cell of clean images, which other cells are compared with."""

FOLDER = "folder"
"""Another name of the suite `clean`, plain accuracy on the images of a folder."""

IMAGES = "images"
"""Id of the only cell of a test set without corruptions."""

WNIDS, NAMES = "WordNet ids", "class names"
"""What the class folders of a test set are named by."""

RESIZE = ("auto", "fit", "none")
"""`fit`: preprocess images as the model file specifies; `none`: use the pixels unchanged; `auto`:
whatever the test set requires."""

SEVERITIES = (1, 2, 3, 4, 5)
"""Severities of every corruption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteConfig:
    """The test set and the selection of its images."""

    name: str
    """One of `runtime.evaluate.suites.SUITES`; `folder` is another name of `clean`."""
    data: Path
    """Folder of the set."""
    clean: Path | None = None
    """Folder of clean images, CLASS/IMAGE, to evaluate as well. The suite `corruptions` always
    does."""
    only: tuple[str, ...] = ()
    """Cells, such as `fog/3`, or corruptions, such as `fog` (default: all except the four extra
    corruptions)."""
    limit: int | None = None
    """Maximum number of images per cell, stratified by class."""
    seed: int = 0
    """Seed of the images drawn for the limit, and of the corruptions."""
    adapt: tuple[int, ...] = ()
    """Numbers of images of each cell that models are adapted to. The largest number of images is
    drawn with the seed and removed from the test images."""
    table: str = "auto"
    """Table of severities for `corruptions`; `auto` chooses by the network's input size."""
    resize: str = "auto"
    """One of RESIZE."""

    def __post_init__(self) -> None:
        if self.name == FOLDER:
            object.__setattr__(self, "name", CLEAN)
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"the limit must be at least one image; found {self.limit}")
        if len(set(self.adapt)) < len(self.adapt) or min(self.adapt, default=1) < 1:
            raise ConfigError(f"adapt needs different numbers of images of at least 1; found {self.adapt}")
        if self.table not in ("auto", *TABLES):
            raise ConfigError(f"unknown table of severities {self.table!r}; expected auto, {', '.join(TABLES)}")
        if self.resize not in RESIZE:
            raise ConfigError(f"resize must be one of {', '.join(RESIZE)}; found {self.resize!r}")
        known = (*CORRUPTIONS, *EXTRAS, CLEAN, IMAGES)
        for name in self.only:
            if name.split("/")[0] not in known:
                raise ConfigError(f"unknown cell {name!r}; {nearest(name, known) or 'expected a name such as fog/3'}")

    def selects(self, cell: str) -> bool:
        """Return whether a cell is selected for evaluation."""
        corruption = cell.split("/")[0]
        return cell in self.only or corruption in self.only if self.only else corruption not in EXTRAS


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A set of images that gets one result, such as ImageNet-C's `fog/3`."""

    id: str
    """`images`, `clean`, or `CORRUPTION/SEVERITY`."""
    images: LabeledImages
    """The images before any corruption that the evaluation computes."""
    field: LabeledImages | None = None
    """Images of the cell that models are adapted to; their classes are not used."""
    resize: str
    """`fit` or `none`."""
    published: bool = False
    """Whether this is a published test set, whose images are read as in its authors' code: without
    the EXIF orientation."""
    corruption: tuple[str, int] | None = None
    """Name and severity of the corruption to compute during the evaluation."""

    @property
    def is_uncorrupted(self) -> bool:
        """Whether this cell has no corruption and severity."""
        return "/" not in self.id


@dataclass(slots=True)
class Opening:
    """State while a test set is opened: the settings, and the findings so far."""

    config: SuiteConfig
    spec: ModelSpec
    skipped: set[str] = field(default_factory=set)
    """Folders that match no class of the model."""
    classes: tuple[int, ...] | None = None
    """The classes that compete; None for all classes."""
    named_by: str = WNIDS
    """`NAMES` if a folder was found by the name of its class, otherwise `WNIDS`."""

    def folder(self, root: Path, find: Callable[[list[str]], Mapping[str, int]]) -> LabeledImages:
        """Return the images in the class folders for which `find` returns a class."""
        names = class_folders(root)
        labels = find(names)
        self.skipped |= set(names) - set(labels)
        return self.limited(image_files(root, labels))

    def by_class(self, root: Path) -> LabeledImages:
        """Return the images in folders named by WordNet ids or class names."""
        if not set(class_folders(root)) & set(self.spec.wnids):
            self.named_by = NAMES
        return self.folder(root, lambda names: by_folder(names, self.spec, str(root)))

    def limited(self, images: LabeledImages) -> LabeledImages:
        """Return the images that the limit selects."""
        limit = self.config.limit
        return images if limit is None else images.limited(limit, self.config.seed)

    def clean(self) -> list[Cell]:
        """Return the cell of clean images; [] if no folder of clean images is set."""
        if self.config.clean is None or not self.config.selects(CLEAN):
            return []
        return [Cell(id=CLEAN, images=self.by_class(self.config.clean), resize="fit")]
