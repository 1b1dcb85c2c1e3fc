"""What a suite consists of, and what is asked of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runtime.errors import ConfigError, nearest
from runtime.evaluate.corruptions import CORRUPTIONS, EXTRAS, TABLES
from runtime.evaluate.images import LabeledImages, class_folders, image_files
from runtime.evaluate.labels import by_folder
from runtime.spec import ModelSpec

__all__ = ["CLEAN", "IMAGES", "RESIZE", "Cell", "Opening", "SuiteConfig"]

CLEAN = "clean"
"""Id of the cell of undisturbed images that others are compared with."""

IMAGES = "images"
"""Id of the one cell of a set that has no corruptions."""

RESIZE = ("auto", "fit", "none")
"""`fit`: as the model file says it wants images; `none`: the pixels as they are, at the network's size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteConfig:
    """Which images of which set."""

    name: str
    """One of `runtime.evaluate.suites.SUITES`."""
    data: Path
    """The set's folder."""
    clean: Path | None = None
    """Undisturbed images, CLASS/IMAGE, to be measured beside the set; `corruptions` has them anyway."""
    only: tuple[str, ...] = ()
    """Cells, such as `fog/3`, or corruptions, such as `fog`. Default: all but the four extra corruptions."""
    limit: int | None = None
    """The most images in a cell, drawn from every class in proportion."""
    seed: int = 0
    """What is drawn: the images of a limit, and the corruptions."""
    table: str = "auto"
    """Table of severities of `corruptions`; `auto`: the one for the network's input size."""
    resize: str = "auto"
    """One of RESIZE; `auto`: what is right for the set."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"the limit must be at least one image; found {self.limit}")
        if self.table not in ("auto", *TABLES):
            raise ConfigError(f"no table {self.table!r} of severities; expected auto, {', '.join(TABLES)}")
        if self.resize not in RESIZE:
            raise ConfigError(f"resize must be one of {', '.join(RESIZE)}; found {self.resize!r}")
        known = (*CORRUPTIONS, *EXTRAS, CLEAN, IMAGES)
        for name in self.only:
            if name.split("/")[0] not in known:
                raise ConfigError(f"no cell {name!r}; {nearest(name, known) or 'cells are called such as fog/3'}")

    def wants(self, cell: str) -> bool:
        """Whether a cell is to be evaluated."""
        corruption = cell.split("/")[0]
        return cell in self.only or corruption in self.only if self.only else corruption not in EXTRAS


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What one number is measured on."""

    id: str
    """`images`, `clean`, or `CORRUPTION/SEVERITY`."""
    images: LabeledImages
    """The images, before any corruption that is made here."""
    resize: str
    """`fit` or `none`."""
    corruption: tuple[str, int] | None = None
    """Made while it is evaluated: name and severity."""


@dataclass(slots=True)
class Opening:
    """What is found out while a set is opened."""

    config: SuiteConfig
    spec: ModelSpec
    skipped: set[str] = field(default_factory=set)
    """Folders that the model has no class for."""
    classes: tuple[int, ...] | None = None
    """The only classes that are asked about; None: all."""

    def folder(self, root: Path, find: Callable[[list[str]], Mapping[str, int]]) -> LabeledImages:
        """The images of the class folders that `find` finds classes for."""
        names = class_folders(root)
        labels = find(names)
        self.skipped |= set(names) - set(labels)
        return self.limited(image_files(root, labels))

    def by_class(self, root: Path) -> LabeledImages:
        """The images of folders called by WordNet ids or class names."""
        return self.folder(root, lambda names: by_folder(names, self.spec, str(root)))

    def limited(self, images: LabeledImages) -> LabeledImages:
        """As many of them as are asked for."""
        limit = self.config.limit
        return images if limit is None else images.limited(limit, self.config.seed)

    def clean(self) -> list[Cell]:
        """The cell of undisturbed images, where a folder of them was given."""
        if self.config.clean is None or not self.config.wants(CLEAN):
            return []
        return [Cell(id=CLEAN, images=self.by_class(self.config.clean), resize="fit")]
