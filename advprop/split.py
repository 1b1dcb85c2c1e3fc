"""Which images calibrate and which are evaluated: never the same."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from calib.images import CalibrationImage, CalibrationSet, calibration_set
from runtime.errors import ConfigError, DataError
from runtime.evaluate.cells import Cell, SuiteConfig
from runtime.evaluate.images import LabeledImages
from runtime.evaluate.suites import open_suite
from runtime.preprocessing import decode
from runtime.spec import ModelSpec
from runtime.system.files import sha256_file
from runtime.system.image_sources import FolderSource

__all__ = ["LEAST", "Split", "split"]

log = logging.getLogger(__name__)

LEAST = 16
"""Fewer calibration images than that are refused."""


@dataclass(frozen=True, slots=True)
class Split:
    """Images for either purpose."""

    suite: SuiteConfig
    """What is evaluated."""
    calibration: CalibrationSet
    words: str
    """Which are which."""


def split(suite: SuiteConfig, spec: ModelSpec, calib_data: Path | None, count: int) -> Split:
    """Chooses at most `count` calibration images, none of which is evaluated, by name or by content.

    Args:
        suite: what is to be evaluated. Without `calib_data` its limit may be lowered, so that images are left.
        spec: of the model.
        calib_data: images to calibrate on, as `advprop calibrate` takes them. Default: images of the suite's own folder
            that are left over, of every class in proportion.
        count: the most calibration images.

    Raises:
        ConfigError: there are too few images for both, or the suite's images cannot calibrate.
        DataError: the images cannot be read.
    """
    if calib_data is None:
        return _of_one_folder(suite, spec, count)
    chosen = calibration_set(calib_data, count, spec.preprocessing)
    kept = _apart(chosen.images, open_suite(suite, spec).cells, suite)
    if not kept:
        raise ConfigError(f"all images of {calib_data} are evaluated too; give others: --calib-data")
    words = f"calibrated on {len(kept)} images of {calib_data}"
    if len(kept) < len(chosen.images):
        words += f", {len(chosen.images) - len(kept)} left out because they are evaluated"
    return Split(suite, dataclasses.replace(chosen, images=kept), words)


def _of_one_folder(suite: SuiteConfig, spec: ModelSpec, count: int) -> Split:
    cells = open_suite(dataclasses.replace(suite, limit=None), spec).cells
    every, source = cells[0].images, cells[0].images.source
    if any(cell.images is not every for cell in cells) or not isinstance(source, FolderSource):
        raise ConfigError(f"the images of {suite.name} are no calibration images; give some: --calib-data DIR")
    limit = suite.limit if suite.limit is not None else len(every) - min(count, len(every) // 4)
    if len(every) - limit < LEAST:
        most = len(every) - LEAST
        raise ConfigError(
            f"INT8 is calibrated on images that are not evaluated, at least {LEAST}; {suite.data} has {len(every)} and "
            f"{min(limit, len(every))} are evaluated. Give --calib-data DIR"
            + (f", or --limit {most} or less" if most > 0 else "")
        )
    evaluated = dataclasses.replace(suite, limit=limit)
    left = _without(every, every.limited(limit, suite.seed)).limited(count, suite.seed)
    found = tuple(_readable(source.root, left.names))
    kept = _apart(found, open_suite(evaluated, spec).cells, suite)
    if not kept:
        raise DataError(f"{suite.data}: no image is left to calibrate on that can be decoded; give --calib-data DIR")
    words = (
        f"evaluated on {limit} of the {len(every)} images of {suite.data}, calibrated on {len(kept)} others of it, "
        "both of every class in proportion"
    )
    return Split(evaluated, CalibrationSet(source=source.root.resolve(), images=kept), words)


def _without(images: LabeledImages, taken: LabeledImages) -> LabeledImages:
    names = set(taken.names)
    pairs = [pair for pair in zip(images.names, images.labels, strict=True) if pair[0] not in names]
    return LabeledImages(images.source, tuple(name for name, _ in pairs), tuple(label for _, label in pairs))


def _readable(root: Path, names: Iterable[str]) -> Iterable[CalibrationImage]:
    for name in names:
        try:
            decode(root / name)
        except DataError as error:
            log.warning("skipped: %s", error)
            continue
        yield CalibrationImage(name, sha256_file(root / name))


def _apart(
    images: tuple[CalibrationImage, ...], cells: tuple[Cell, ...], suite: SuiteConfig
) -> tuple[CalibrationImage, ...]:
    """Those whose content is not evaluated."""
    hashes: set[str] = set()
    for source, names in {(cell.images.source, cell.images.names) for cell in cells}:
        if isinstance(source, FolderSource):
            hashes |= {sha256_file(source.root / name) for name in names}
        else:
            log.warning("%s: whether calibration images are among these arrays is not checked", suite.data)
    return tuple(image for image in images if image.sha256 not in hashes)
