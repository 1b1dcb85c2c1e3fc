"""The metrics of a result, computed from its counts.

Three metrics are often confused:

`mce_alexnet`   mean over fifteen corruptions of the model's error ÷ AlexNet's error under the same
                corruption, in percent: 100 is as robust as AlexNet. It is defined only for
                ImageNet's 1,000 classes and ImageNet-C's fifteen corruptions.
`mce_reference` the same with the reference model's errors in place of AlexNet's: 100 is as robust as
                the reference. It is defined for any classes.
`mean_error`    plain mean of the error, from 0 to 1. It is defined for any classes. Papers report
                it for CIFAR-10-C.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from runtime.errors import InputError
from runtime.evaluate.corruptions import CORRUPTIONS
from runtime.evaluate.counts import BINS, GROUPS, NANO, Counts
from runtime.evaluate.intervals import Interval, jackknife, newcombe_paired, wilson, zero_variance

__all__ = [
    "ALEXNET",
    "ALEXNET_CLEAN",
    "adapted_names",
    "calibration_error",
    "corruption_errors",
    "difference_interval_of",
    "error_of",
    "grouped_calibration_error",
    "interval_of",
    "mce_alexnet",
    "mce_reference",
    "mean_error",
    "reference_of",
    "relative_mce_alexnet",
    "rms_calibration_error",
    "summarize",
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
"""AlexNet's error by corruption, mean over severities. Source: github.com/hendrycks/robustness."""

ALEXNET_CLEAN = 0.435
"""AlexNet's error on ImageNet. Source: Hendrycks and Dietterich (ICLR 2019), table 1."""

Errors = Mapping[str, Sequence[float]]
"""Corruption → errors at severities 1 to 5, from 0 to 1."""
Cells = Mapping[str, Counts]
Statistic = Callable[[Cells, Sequence[int] | None], float]
"""A statistic of cells, over all images or the images of some groups."""
Grouped = Callable[[Sequence[int]], float]
"""A statistic over the images of some groups."""

_ROUNDING = 1e-9
"""Width below which an interval consists of rounding errors only."""

MCE_UNIT = "percent of AlexNet's error, mean over the fifteen corruptions; AlexNet is 100"
RELATIVE_UNIT = (
    "percent of the error that corruption adds for AlexNet, mean over the fifteen corruptions; AlexNet is 100"
)
REFERENCE_UNIT = "percent of the reference model's error, mean over the corruptions; the reference is 100"
MEAN_UNIT = "share of images, plain mean over corruptions and severities; not to be compared with mce_alexnet"


def error_of(counts: Counts, groups: Iterable[int] | None = None) -> float:
    """Return the top-1 error, from 0 to 1, over all images or the images of some groups."""
    if groups is None:
        return 1 - counts.top1 / counts.images
    chosen = list(groups)
    images = sum(counts.group_images[group] for group in chosen)
    return 1 - sum(counts.group_right[group] for group in chosen) / images


def corruption_errors(cells: Cells, groups: Iterable[int] | None = None) -> dict[str, list[float]]:
    """Return the errors of each of the fifteen corruptions that has all five severities.

    Args:
        cells: `CORRUPTION/SEVERITY` → counts, with images in each; other names are ignored.
        groups: count only the images of these groups.
    """
    chosen = None if groups is None else list(groups)
    names = [name for name in CORRUPTIONS if all(f"{name}/{severity}" in cells for severity in range(1, 6))]
    return {name: [error_of(cells[f"{name}/{severity}"], chosen) for severity in range(1, 6)] for name in names}


def mce_alexnet(errors: Errors) -> float:
    """Return the mean corruption error, in percent of AlexNet's error; AlexNet's own is 100.

    CE of one corruption = Σ over severities of the error ÷ Σ of AlexNet's errors. Source: Hendrycks
    and Dietterich (ICLR 2019), section 4.2.

    Raises:
        InputError: the corruptions are not exactly the fifteen, with five severities each.
    """
    _check_complete(errors)
    return 100 * _mean([_mean(errors[name]) / ALEXNET[name] for name in CORRUPTIONS])


def mce_reference(errors: Errors, reference: Errors) -> float:
    """Return the mean corruption error, in percent of a reference model's error on the same images.

    CE of one corruption = Σ over severities of the error ÷ Σ of the reference's errors, as in
    `mce_alexnet`.

    Raises:
        InputError: no corruption has all five severities, or the reference makes no error under one
            of them.
    """
    if not errors:
        raise InputError("mCE needs a corruption with all five severities; found none")
    perfect = [name for name in errors if not any(reference[name])]
    if perfect:
        raise InputError(f"the reference makes no error under {', '.join(perfect)}, so nothing is relative to it")
    return 100 * _mean([_mean(levels) / _mean(reference[name]) for name, levels in errors.items()])


def relative_mce_alexnet(errors: Errors, clean_error: float) -> float:
    """Return the relative mCE, in percent: error added by corruption ÷ error added for AlexNet.

    Raises:
        InputError: the corruptions are not exactly the fifteen, with five severities each.
    """
    _check_complete(errors)
    return 100 * _mean([(_mean(errors[name]) - clean_error) / (ALEXNET[name] - ALEXNET_CLEAN) for name in CORRUPTIONS])


def mean_error(errors: Errors) -> float:
    """Return the mean error over corruptions and severities, from 0 to 1.

    Raises:
        InputError: no corruption has all five severities.
    """
    if not errors:
        raise InputError("the mean error needs a corruption with all five severities; found none")
    return _mean([_mean(levels) for levels in errors.values()])


def calibration_error(counts: Counts) -> float:
    """Return the expected calibration error, 0 to 1: the mean of the bins' |gap| over images.

    Source: Guo et al. (ICML 2017), equation 3, with fifteen bins of equal width.
    """
    return math.fsum(share * abs(gap) for share, gap in _calibration_gaps(counts))


def grouped_calibration_error(counts: Counts, groups: Iterable[int] | None = None) -> float:
    """Return `calibration_error` over the images of some groups (default: all).

    `counts.group_gap_nano` must not be None.
    """
    assert counts.group_gap_nano is not None
    chosen = list(range(GROUPS) if groups is None else groups)
    gaps = (sum(counts.group_gap_nano[group * BINS + place] for group in chosen) for place in range(BINS))
    return sum(map(abs, gaps)) / NANO / sum(counts.group_images[group] for group in chosen)


def rms_calibration_error(counts: Counts) -> float:
    """Return the RMS calibration error, 0 to 1: root mean square over images of their bin's gap.

    Source: Hendrycks, Mazeika and Dietterich, "Deep Anomaly Detection with Outlier Exposure" (ICLR
    2019). They use bins with equal numbers of images; bins of equal width are used here, because
    their counts can be added over shards.
    """
    return math.sqrt(math.fsum(share * gap**2 for share, gap in _calibration_gaps(counts)))


def _calibration_gaps(counts: Counts) -> list[tuple[float, float]]:
    """Return (share of the images, accuracy − confidence) of each bin that has images."""
    rows = zip(counts.bin_images, counts.bin_right, counts.bin_confidence_nano, strict=True)
    return [(n / counts.images, right / n - confidence / NANO / n) for n, right, confidence in rows if n]


def _check_complete(errors: Errors) -> None:
    wrong = [name for name in CORRUPTIONS if len(errors.get(name, ())) != 5]
    unknown = sorted(set(errors) - set(CORRUPTIONS))
    if wrong or unknown:
        raise InputError(
            "mce_alexnet needs exactly the fifteen corruptions with five severities each; "
            + (f"found no errors or another number for {', '.join(wrong)}" if wrong else f"found {', '.join(unknown)}")
        )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def summarize(cells: Cells, *, why_no_mce: str = "", clean: str = "clean") -> dict[str, Any]:
    """Return the `metrics` of a result.

    Args:
        cells: counts by cell, with images in each.
        why_no_mce: why these images cannot be compared with AlexNet; "" if they can.
        clean: the cell whose error the relative mCE uses.
    """
    metrics: dict[str, Any] = {"cells": {name: _cell_metrics(counts) for name, counts in cells.items()}}
    errors = corruption_errors(cells)
    if not any("/" in name for name in cells):
        return metrics
    if not errors:
        why = "no corruption has all five severities"
        return metrics | {name: _no_value(why) for name in ("mce_alexnet", "relative_mce_alexnet", "mean_error")}
    if len(errors) < len(CORRUPTIONS):
        why_no_mce = why_no_mce or f"{len(errors)} of the fifteen corruptions have all five severities"
    metrics["mean_error"] = {"corruptions": list(errors), **_with_interval(cells, _mean_error, MEAN_UNIT, (0.0, 1.0))}
    metrics |= _relative_to_reference(cells, errors)
    if why_no_mce:
        return metrics | {name: _no_value(why_no_mce) for name in ("mce_alexnet", "relative_mce_alexnet")}
    all_wrong = dict.fromkeys(CORRUPTIONS, [1.0] * 5)
    metrics["mce_alexnet"] = _with_interval(cells, _mce, MCE_UNIT, (0.0, mce_alexnet(all_wrong)))
    if clean in cells:
        highest = relative_mce_alexnet(all_wrong, 0.0)
        metrics["relative_mce_alexnet"] = _with_interval(cells, _relative_mce, RELATIVE_UNIT, (-highest, highest))
    else:
        metrics["relative_mce_alexnet"] = _no_value("it needs the error on clean images: --clean DIR")
    return metrics


def adapted_names(metrics: Mapping[str, Any], images: int) -> dict[str, Any]:
    """Rename the metrics of a model that was adapted to `images` images of every cell.

    mCE forbids adaptation, so these numbers must not be compared with it: `mce_alexnet` becomes
    `mce_adapted_N`, and the others get the suffix `_adapted_N`.
    """
    names = {name: f"{name}_adapted_{images}" for name in ("relative_mce_alexnet", "mce_reference", "mean_error")}
    names["mce_alexnet"] = f"mce_adapted_{images}"
    return {names.get(name, name): value for name, value in metrics.items()}


def _relative_to_reference(cells: Cells, errors: Errors) -> dict[str, Any]:
    """Return the mCE in percent of the reference's error; {} without a reference."""
    chosen = {f"{name}/{severity}": cells[f"{name}/{severity}"] for name in errors for severity in range(1, 6)}
    if any(counts.pairs is None for counts in chosen.values()):
        return {}
    reference = {name: reference_of(counts) for name, counts in chosen.items()}

    def statistic(groups: Sequence[int] | None) -> float:
        return mce_reference(corruption_errors(chosen, groups), corruption_errors(reference, groups))

    try:
        value = statistic(None)
    except InputError as error:
        return {"mce_reference": _no_value(str(error))}
    ends = (0.0, 100 * _mean([1 / _mean(levels) for levels in corruption_errors(reference).values()]))
    try:
        interval = difference_interval_of(list(chosen.values()), statistic, ends)
    except InputError:  # without some group of images, the reference makes no error
        interval = None
    summary = {"value": value, "interval": interval, "difference": value - 100, "unit": REFERENCE_UNIT}
    summary["difference_interval"] = None if interval is None else (interval[0] - 100, interval[1] - 100)
    return {"mce_reference": {**summary, "corruptions": list(errors)}}


def _cell_metrics(counts: Counts) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "images": counts.images,
        "top1": counts.top1 / counts.images,
        "top1_interval": wilson(counts.top1, counts.images),
        "top5": counts.top5 / counts.images,
        "calibration_error": calibration_error(counts),
        "rms_calibration_error": rms_calibration_error(counts),
    }
    if counts.adapted is not None:
        summary["adapted"] = counts.adapted > 0
    if counts.pairs is not None:
        pairs, total = counts.pairs, counts.images
        neither = total - pairs.both - pairs.only_model - pairs.only_reference
        summary["against_reference"] = {
            "agreement": pairs.agree / total,
            "agreement_interval": wilson(pairs.agree, total),
            "top1_difference": (pairs.only_model - pairs.only_reference) / total,
            "top1_difference_interval": newcombe_paired(pairs.both, pairs.only_model, pairs.only_reference, neither),
        }
    return summary


def _no_value(why: str) -> dict[str, Any]:
    return {"value": None, "why_not": why}


def _with_interval(cells: Cells, statistic: Statistic, unit: str, ends: Interval) -> dict[str, Any]:
    """Return a value and its difference from the reference's value, each with its interval."""
    value, every = statistic(cells, None), list(cells.values())
    interval = interval_of(every, lambda groups: statistic(cells, groups), ends)
    summary: dict[str, Any] = {"value": value, "interval": interval, "unit": unit}
    if all(counts.pairs is not None for counts in every):
        reference = {name: reference_of(counts) for name, counts in cells.items()}
        summary["difference"] = value - statistic(reference, None)
        summary["difference_interval"] = difference_interval_of(
            every,
            lambda groups: statistic(cells, groups) - statistic(reference, groups),
            ends,
            equal_weights=statistic is not _relative_mce,
        )
    return summary


def interval_of(cells: Collection[Counts], statistic: Grouped, ends: Interval = (0.0, 1.0)) -> Interval | None:
    """Return an interval of a mean of the errors of cells that all have the same images.

    Args:
        cells: counts, with images in each.
        statistic: returns the mean over the images of some groups.
        ends: lowest and highest possible value of an image.

    Returns:
        The interval. None if there are too few images for every group to have one, or if all groups
        have the same mean although images differ: the variance is then unknown.
    """
    alike = all(counts.top1 in (0, counts.images) for counts in cells)
    return _zero_variance(cells, statistic, ends) if alike else _jackknife(cells, statistic)


def difference_interval_of(
    cells: Collection[Counts], statistic: Grouped, ends: Interval = (0.0, 1.0), *, equal_weights: bool = True
) -> Interval | None:
    """Return an interval of the difference of such a mean from the reference's mean.

    Two models that answer alike and two models that differ in a few answers get intervals by the
    same rule: the jackknife over images, but never narrower than what N equal answers allow. Of N
    answers that are all equal, a share of at most z²/(N + z²) differs. N counts every image under
    every corruption and severity, because rounding flips single answers, not all answers of an
    image.

    Args:
        cells: counts with pairs, with images in each.
        statistic: returns the difference over the images of some groups.
        ends: lowest and highest possible value of an answer.
        equal_weights: whether the cells have about the same weight in the statistic. If not, N is
            the number of images.

    Returns:
        The interval. None if answers differ and `interval_of` would return None.
    """
    pairs = [counts.pairs for counts in cells if counts.pairs is not None]
    groups = [place for place in range(GROUPS) if all(counts.group_images[place] for counts in cells)]
    answers = (sum if equal_weights else min)(counts.images for counts in cells)
    span = ends[1] - ends[0]
    if all(pair.only_model == pair.only_reference == 0 for pair in pairs):
        return zero_variance(statistic(groups), answers, statistic(groups) - span, statistic(groups) + span)
    found = _jackknife(cells, statistic)
    if found is None:
        return None
    middle, half = (found[0] + found[1]) / 2, (found[1] - found[0]) / 2
    low, high = zero_variance(0.0, answers, -span, span)
    half = max(half, (high - low) / 2)
    return middle - half, middle + half


def _zero_variance(cells: Collection[Counts], statistic: Grouped, ends: Interval) -> Interval:
    groups = [place for place in range(GROUPS) if all(counts.group_images[place] for counts in cells)]
    return zero_variance(statistic(groups), min(counts.images for counts in cells), *ends)


def _jackknife(cells: Collection[Counts], statistic: Grouped) -> Interval | None:
    if any(min(counts.group_images) == 0 for counts in cells):
        return None
    found = jackknife(statistic, GROUPS)
    return None if found is None or found[1] - found[0] < _ROUNDING else found


def reference_of(counts: Counts) -> Counts:
    """Return the reference model's counts, for errors only. `counts.pairs` must not be None."""
    assert counts.pairs is not None
    return dataclasses.replace(
        counts,
        top1=counts.pairs.both + counts.pairs.only_reference,
        group_right=counts.pairs.reference_group_right,
        pairs=None,
    )


def _mean_error(cells: Cells, groups: Sequence[int] | None) -> float:
    return mean_error(corruption_errors(cells, groups))


def _mce(cells: Cells, groups: Sequence[int] | None) -> float:
    return mce_alexnet(corruption_errors(cells, groups))


def _relative_mce(cells: Cells, groups: Sequence[int] | None) -> float:
    return relative_mce_alexnet(corruption_errors(cells, groups), error_of(cells["clean"], groups))
