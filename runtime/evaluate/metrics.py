"""The numbers that people compare, from counts.

Two of them are often confused, and never here:

`mce_alexnet`   the mean over fifteen corruptions of the model's error ÷ AlexNet's on the same corruption, in percent:
                100 is as good as AlexNet. Only of ImageNet's 1,000 classes under ImageNet-C's fifteen corruptions.
`mean_error`    the plain mean of the error, a share from 0 to 1. Of any labels; what papers report of CIFAR-10-C.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from runtime.errors import InputError
from runtime.evaluate.corruptions import CORRUPTIONS
from runtime.evaluate.counts import NANO, Counts

__all__ = [
    "ALEXNET",
    "ALEXNET_CLEAN",
    "calibration_error",
    "corruption_errors",
    "error_of",
    "mce_alexnet",
    "mean_error",
    "relative_mce_alexnet",
    "rms_calibration_error",
]

ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""AlexNet's error on ImageNet-C, the mean over severities, by name. Source: github.com/hendrycks/robustness."""

ALEXNET_CLEAN = 0.435
"""AlexNet's error on ImageNet. Source: Hendrycks and Dietterich (ICLR 2019), table 1."""

Errors = Mapping[str, Sequence[float]]
"""Corruption → the errors at severities 1 to 5, shares from 0 to 1."""


def error_of(counts: Counts, groups: Iterable[int] | None = None) -> float:
    """Returns the top-1 error, a share from 0 to 1: of all images, or of those of some groups."""
    if groups is None:
        return 1 - counts.top1 / counts.images
    chosen = list(groups)
    images = sum(counts.group_images[group] for group in chosen)
    return 1 - sum(counts.group_right[group] for group in chosen) / images


def corruption_errors(cells: Mapping[str, Counts], groups: Iterable[int] | None = None) -> dict[str, list[float]]:
    """Returns the errors of those of the fifteen corruptions that have all five severities.

    Args:
        cells: `CORRUPTION/SEVERITY` → counts, with images in each; other names are left out.
        groups: count the images of these groups only.
    """
    chosen = None if groups is None else list(groups)
    names = [name for name in CORRUPTIONS if all(f"{name}/{severity}" in cells for severity in range(1, 6))]
    return {name: [error_of(cells[f"{name}/{severity}"], chosen) for severity in range(1, 6)] for name in names}


def mce_alexnet(errors: Errors) -> float:
    """Returns the mean corruption error, in percent of AlexNet's error; AlexNet's own is 100.

    CE of one corruption = Σ over severities of the error ÷ Σ of AlexNet's. Source: Hendrycks and
    Dietterich, section 4.2.

    Raises:
        InputError: not exactly the fifteen corruptions with five severities each.
    """
    _check(errors)
    return 100 * _mean([_mean(errors[name]) / ALEXNET[name] for name in CORRUPTIONS])


def relative_mce_alexnet(errors: Errors, clean_error: float) -> float:
    """Returns the relative mCE, in percent: what corruption adds to the clean error, beside what it adds to AlexNet's.

    Raises:
        InputError: not exactly the fifteen corruptions with five severities each.
    """
    _check(errors)
    return 100 * _mean([(_mean(errors[name]) - clean_error) / (ALEXNET[name] - ALEXNET_CLEAN) for name in CORRUPTIONS])


def mean_error(errors: Errors) -> float:
    """Returns the mean of the error over corruptions and severities, a share from 0 to 1. Raises InputError of none."""
    if not errors:
        raise InputError("the mean error of no corruption is nothing: found no corruption with all five severities")
    return _mean([_mean(levels) for levels in errors.values()])


def calibration_error(counts: Counts) -> float:
    """Returns the expected calibration error, a share: the mean over images of |accuracy − confidence| of their bin.

    Source: Guo et al. (ICML 2017), equation 3, with fifteen bins of equal width.
    """
    return math.fsum(share * abs(gap) for share, gap in _gaps(counts))


def rms_calibration_error(counts: Counts) -> float:
    """Returns the root of the mean square of accuracy − confidence of the images' bins, a share.

    Source: Hendrycks, Mazeika and Dietterich, "Deep Anomaly Detection with Outlier Exposure" (ICLR 2019), who put
    equally many images into each bin; bins here are of equal width, so that shards add up.
    """
    return math.sqrt(math.fsum(share * gap**2 for share, gap in _gaps(counts)))


def _gaps(counts: Counts) -> list[tuple[float, float]]:
    """Of each bin with images: its share of the images, and its accuracy less its confidence."""
    rows = zip(counts.bin_images, counts.bin_right, counts.bin_confidence_nano, strict=True)
    return [(n / counts.images, right / n - confidence / NANO / n) for n, right, confidence in rows if n]


def _check(errors: Errors) -> None:
    wrong = [name for name in CORRUPTIONS if len(errors.get(name, ())) != 5]
    strangers = sorted(set(errors) - set(CORRUPTIONS))
    if wrong or strangers:
        raise InputError(
            "mce_alexnet is of the fifteen corruptions at five severities each; "
            + (f"found no or other than five of {', '.join(wrong)}" if wrong else f"found {', '.join(strangers)} too")
        )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
