"""Choose calibration images that are disjoint from the evaluated images."""

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
from runtime.spec import ModelSpec
from runtime.system.decode import decode
from runtime.system.files import sha256_file
from runtime.system.image_sources import FolderSource

__all__ = ["MIN_CALIBRATION_IMAGES", "Split", "split"]

log = logging.getLogger(__name__)

MIN_CALIBRATION_IMAGES = 16
"""Minimum number of calibration images taken from the suite's own folder."""


@dataclass(frozen=True, slots=True)
class Split:
    """Images to evaluate and images to calibrate on."""

    suite: SuiteConfig
    """The test set to evaluate."""
    calibration: CalibrationSet
    """The images to calibrate on."""
    description: str
    """A sentence fragment that describes both, for reports."""


def split(suite: SuiteConfig, spec: ModelSpec, calib_data: Path | None, count: int) -> Split:
    """Choose up to `count` calibration images whose names and contents are not evaluated.

    Args:
        suite: test set to evaluate. If it has no limit and `calib_data` is None, a limit is set to
            leave images for calibration.
        spec: spec of the model.
        calib_data: folder or manifest of calibration images, as for `advprop calibrate` (default:
            images of the suite's folder that are not evaluated, stratified by class).
        count: maximum number of calibration images.

    Raises:
        ConfigError: there are too few images for both, or the suite has no images to calibrate on.
        DataError: the images cannot be read.
    """
    if calib_data is None:
        return _split_folder(suite, spec, count)
    chosen = calibration_set(calib_data, count, spec.preprocessing)
    kept = _not_evaluated(chosen.images, open_suite(suite, spec).cells, suite)
    if not kept:
        raise ConfigError(f"all images of {calib_data} are evaluated too; pass other images with --calib-data DIR")
    description = f"calibrated on {len(kept)} images of {calib_data}"
    if len(kept) < len(chosen.images):
        description += f" ({len(chosen.images) - len(kept)} others are evaluated and were excluded)"
    return Split(suite, dataclasses.replace(chosen, images=kept), description)


def _split_folder(suite: SuiteConfig, spec: ModelSpec, count: int) -> Split:
    cells = open_suite(dataclasses.replace(suite, limit=None), spec).cells
    every, source = cells[0].images, cells[0].images.source
    if any(cell.images is not every for cell in cells) or not isinstance(source, FolderSource):
        raise ConfigError(f"{suite.name} has no images to calibrate on; pass calibration images with --calib-data DIR")
    limit = suite.limit if suite.limit is not None else len(every) - min(count, len(every) // 4)
    if len(every) - limit < MIN_CALIBRATION_IMAGES:
        most = len(every) - MIN_CALIBRATION_IMAGES
        raise ConfigError(
            f"INT8 calibration needs at least {MIN_CALIBRATION_IMAGES} images that are not evaluated; {suite.data} has "
            f"{len(every)} images, of which {min(limit, len(every))} are evaluated. Pass --calib-data DIR"
            + (f", or --limit {most} or less" if most > 0 else "")
        )
    evaluated = dataclasses.replace(suite, limit=limit)
    left = _exclude(every, every.limited(limit, suite.seed)).limited(count, suite.seed)
    found = tuple(_decodable(source.root, left.names))
    kept = _not_evaluated(found, open_suite(evaluated, spec).cells, suite)
    if not kept:
        raise DataError(f"{suite.data}: none of the images left for calibration can be decoded; pass --calib-data DIR")
    description = (
        f"evaluated on {limit} of the {len(every)} images of {suite.data}, calibrated on {len(kept)} of the others, "
        "both stratified by class"
    )
    return Split(evaluated, CalibrationSet(source=source.root.resolve(), images=kept), description)


def _exclude(images: LabeledImages, taken: LabeledImages) -> LabeledImages:
    names = set(taken.names)
    pairs = [pair for pair in zip(images.names, images.labels, strict=True) if pair[0] not in names]
    return LabeledImages(images.source, tuple(name for name, _ in pairs), tuple(label for _, label in pairs))


def _decodable(root: Path, names: Iterable[str]) -> Iterable[CalibrationImage]:
    for name in names:
        try:
            decode(root / name)
        except DataError as error:
            log.warning("skipped: %s", error)
            continue
        yield CalibrationImage(name, sha256_file(root / name))


def _not_evaluated(
    images: tuple[CalibrationImage, ...], cells: tuple[Cell, ...], suite: SuiteConfig
) -> tuple[CalibrationImage, ...]:
    """Return the images whose content is not among the evaluated images."""
    hashes: set[str] = set()
    for source, names in {(cell.images.source, cell.images.names) for cell in cells}:
        if isinstance(source, FolderSource):
            hashes |= {sha256_file(source.root / name) for name in names}
        else:
            log.warning("%s: cannot check whether these arrays contain calibration images", suite.data)
    return tuple(image for image in images if image.sha256 not in hashes)
