"""The test sets of robustness by name, each as cells of labeled images.

A cell is what one number is measured on: a set of images, or ImageNet-C's `fog/3`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container
from dataclasses import dataclass, replace

import numpy as np

from runtime.errors import ConfigError, nearest
from runtime.evaluate.cells import CLEAN, Cell, Opening, SuiteConfig
from runtime.evaluate.class_lists import IMAGENET_A, IMAGENET_R
from runtime.evaluate.corruptions import corrupt, table_for
from runtime.evaluate.dataset_layouts import (
    labeled_folders,
    made_here,
    numbered_folders,
    released_arrays,
    released_folders,
    two_hundred,
)
from runtime.spec import ModelSpec, Preprocessing

__all__ = ["SUITES", "Suite", "open_suite"]

log = logging.getLogger(__name__)

SUITES: dict[str, Callable[[Opening], list[Cell]]] = {
    "imagenet": labeled_folders("fit"),
    "imagenet-c": released_folders,
    "imagenet-a": two_hundred(IMAGENET_A),
    "imagenet-r": two_hundred(IMAGENET_R),
    "imagenet-v2": numbered_folders,
    "sketch": labeled_folders("fit"),
    "stylized": labeled_folders("none"),
    "cifar10": labeled_folders("fit"),
    "cifar10-c": released_arrays,
    "corruptions": made_here,
}
"""Suite → what lists its cells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A test set, for models of one list of classes and one input size."""

    name: str
    cells: tuple[Cell, ...]
    """In the order in which they are reported."""
    seed: int
    table: str | None
    """Table of severities of the corruptions made here; None where none are made."""
    classes: tuple[int, ...] | None = None
    """The only classes that are asked about; None: all of the model's."""
    skipped: tuple[str, ...] = ()
    """Folders that the model has no class for."""

    def probe(self, cells: Container[str], size: Preprocessing) -> None:
        """Makes every corruption of these cells once: what is missing is found now, not hours later.

        Args:
            cells: their ids.
            size: of the network's images.

        Raises:
            BackendUnavailable: something that makes a corruption is missing.
        """
        for name in {cell.corruption[0] for cell in self.cells if cell.corruption and cell.id in cells}:
            assert self.table is not None
            corrupt(np.zeros((size.height, size.width, 3), np.uint8), name, 1, table=self.table)


def open_suite(config: SuiteConfig, spec: ModelSpec) -> Suite:
    """Lists the images of a suite, for models that answer as `spec` says.

    Raises:
        ConfigError: an unknown suite, or a cell that it does not have.
        DataError: the folder is not laid out as the set is, or has no image of the model's classes.
        SpecError: the model's classes do not go with the set.
    """
    if config.name not in SUITES:
        raise ConfigError(
            f"no suite {config.name!r}; {nearest(config.name, SUITES) or 'there are ' + ', '.join(SUITES)}"
        )
    opening = Opening(config, spec)
    cells = [cell for cell in SUITES[config.name](opening) if config.wants(cell.id)]
    if config.resize != "auto":
        # The clean images beside a set are ordinary ones, but for the set that is made of them.
        kept = () if config.name == "corruptions" else (CLEAN,)
        cells = [cell if cell.id in kept else replace(cell, resize=config.resize) for cell in cells]
    there = {cell.id for cell in cells} | {cell.id.split("/")[0] for cell in cells}
    missing = [name for name in config.only if name not in there]
    if missing or not cells:
        raise ConfigError(f"{config.name} in {config.data} has no {', '.join(missing) or 'cells to evaluate'}")
    if opening.skipped:
        log.warning(
            "%s: the model has no class for %d folders (%s, …); their images are left out",
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
    )
