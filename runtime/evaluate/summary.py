"""From the counts of cells to the numbers of a report. Nothing here is measured; all of it can be made again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from runtime.evaluate.corruptions import CORRUPTIONS
from runtime.evaluate.counts import GROUPS, Counts
from runtime.evaluate.intervals import Interval, jackknife, newcombe_paired, unvaried, wilson
from runtime.evaluate.metrics import (
    calibration_error,
    corruption_errors,
    error_of,
    mce_alexnet,
    mean_error,
    relative_mce_alexnet,
    rms_calibration_error,
)

__all__ = ["difference_interval_of", "interval_of", "reference_of", "summarize"]

Cells = Mapping[str, Counts]
Statistic = Callable[[Cells, Sequence[int] | None], float]
"""Of cells, of all images or those of some groups."""

_ROUNDING = 1e-9
"""Width below which an interval is of rounding errors only."""

MCE_UNIT = "percent of AlexNet's error, mean over the fifteen corruptions; AlexNet is 100"
RELATIVE_UNIT = "percent of what corruption adds to AlexNet's error, mean over the fifteen corruptions; AlexNet is 100"
MEAN_UNIT = "share of images, plain mean over corruptions and severities; not to be compared with mce_alexnet"


def summarize(cells: Cells, *, why_no_mce: str = "", clean: str = "clean") -> dict[str, Any]:
    """Returns what a result's `metrics` holds.

    Args:
        cells: counts by cell, with images in each.
        why_no_mce: why AlexNet is no yardstick for these images; "" where it is one.
        clean: the cell that relative mCE takes the clean error from.
    """
    metrics: dict[str, Any] = {"cells": {name: _cell(counts) for name, counts in cells.items()}}
    errors = corruption_errors(cells)
    corrupted = any("/" in name for name in cells)
    if not corrupted:
        return metrics
    if not errors:
        why = "no corruption has all five severities"
        return metrics | {name: _nothing(why) for name in ("mce_alexnet", "relative_mce_alexnet", "mean_error")}
    if len(errors) < len(CORRUPTIONS):
        why_no_mce = why_no_mce or f"{len(errors)} of the fifteen corruptions have all five severities"
    metrics["mean_error"] = {"corruptions": list(errors), **_statistic(cells, _mean_error, MEAN_UNIT, (0.0, 1.0))}
    if why_no_mce:
        return metrics | {name: _nothing(why_no_mce) for name in ("mce_alexnet", "relative_mce_alexnet")}
    wrong = dict.fromkeys(CORRUPTIONS, [1.0] * 5)
    metrics["mce_alexnet"] = _statistic(cells, _mce, MCE_UNIT, (0.0, mce_alexnet(wrong)))
    if clean in cells:
        most = relative_mce_alexnet(wrong, 0.0)
        metrics["relative_mce_alexnet"] = _statistic(cells, _relative_mce, RELATIVE_UNIT, (-most, most))
    else:
        metrics["relative_mce_alexnet"] = _nothing("it needs the error on clean images: --clean DIR")
    return metrics


def _cell(counts: Counts) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "images": counts.images,
        "top1": counts.top1 / counts.images,
        "top1_interval": wilson(counts.top1, counts.images),
        "top5": counts.top5 / counts.images,
        "calibration_error": calibration_error(counts),
        "rms_calibration_error": rms_calibration_error(counts),
    }
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


def _nothing(why: str) -> dict[str, Any]:
    return {"value": None, "why_not": why}


def _statistic(cells: Cells, statistic: Statistic, unit: str, ends: Interval) -> dict[str, Any]:
    """A value with its interval, and its difference from the reference's with that of its own."""
    value, every = statistic(cells, None), list(cells.values())
    interval = interval_of(every, lambda groups: statistic(cells, groups), ends)
    summary: dict[str, Any] = {"value": value, "interval": interval, "unit": unit}
    if all(counts.pairs is not None for counts in every):
        reference = {name: reference_of(counts) for name, counts in cells.items()}
        summary["difference"] = value - statistic(reference, None)
        summary["difference_interval"] = difference_interval_of(
            every, lambda groups: statistic(cells, groups) - statistic(reference, groups), ends
        )
    return summary


Grouped = Callable[[Sequence[int]], float]
"""A statistic of the images of some groups."""


def interval_of(cells: Collection[Counts], statistic: Grouped, ends: Interval = (0.0, 1.0)) -> Interval | None:
    """Returns an interval of a mean of the errors of cells, all of the same images.

    Args:
        cells: with images in each.
        statistic: the mean, of the images of some groups.
        ends: the least and the most that an image can give.

    Returns:
        Lower and upper end; None where there are too few images for every group to have one, or where groups are
        alike though images are not, which leaves nothing to go by.
    """
    alike = all(counts.top1 in (0, counts.images) for counts in cells)
    return _unvaried(cells, statistic, ends) if alike else _jackknife(cells, statistic)


def difference_interval_of(
    cells: Collection[Counts], statistic: Grouped, ends: Interval = (0.0, 1.0)
) -> Interval | None:
    """Returns an interval of the difference of such a mean from the reference's; `ends` are those of the mean."""
    pairs = [counts.pairs for counts in cells if counts.pairs is not None]
    if all(pair.only_model == pair.only_reference == 0 for pair in pairs):
        return _unvaried(cells, statistic, (ends[0] - ends[1], ends[1] - ends[0]))
    return _jackknife(cells, statistic)


def _unvaried(cells: Collection[Counts], statistic: Grouped, ends: Interval) -> Interval:
    groups = [place for place in range(GROUPS) if all(counts.group_images[place] for counts in cells)]
    return unvaried(statistic(groups), min(counts.images for counts in cells), *ends)


def _jackknife(cells: Collection[Counts], statistic: Grouped) -> Interval | None:
    if any(min(counts.group_images) == 0 for counts in cells):
        return None
    found = jackknife(statistic, GROUPS)
    return None if found is None or found[1] - found[0] < _ROUNDING else found


def reference_of(counts: Counts) -> Counts:
    """Returns the reference model's counts on the same images, as far as errors go; `counts.pairs` must be there."""
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
