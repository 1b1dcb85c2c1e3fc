"""Compare models with a baseline on the same images: values, paired intervals, and their power.

All values and differences are in the units that tables show: percent, percentage points, and mCE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import DataError
from runtime.evaluate.attacks.config import CLEAN as UNATTACKED
from runtime.evaluate.attacks.config import NOISE
from runtime.evaluate.attacks.results import AttackResult
from runtime.evaluate.counts import GROUPS, Counts, Pairs
from runtime.evaluate.intervals import Interval, detectable, jackknife, newcombe_paired, wilson
from runtime.evaluate.metrics import calibration_error, grouped_calibration_error
from runtime.evaluate.report.numbers import corruption_errors_of
from runtime.evaluate.report.rows import comparable_facts, uncorrupted_cell, why_separate
from runtime.evaluate.results import Result, dataset_name, finished

__all__ = ["Compared", "Comparison", "Measured", "Metric", "Scale", "compare", "rebase"]


class Scale(Enum):
    """Unit of a metric: what a difference is called, and its number of decimals."""

    PERCENT = ("points", 1)
    """Values in percent, differences in percentage points."""
    MCE = ("points of mCE", 1)
    SHARE = ("", 3)
    """From 0 to 1, as the calibration error is written."""

    def __init__(self, difference: str, decimals: int) -> None:
        self.difference = difference
        self.decimals = decimals


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A quantity that models are compared by."""

    name: str
    """Name in conditions such as `top1 < baseline - 0.5`."""
    title: str
    scale: Scale = Scale.PERCENT
    higher_is_better: bool = False


TOP1 = Metric(name="top1", title="clean top-1", higher_is_better=True)
MEAN_ERROR = Metric(name="mean_error", title="mean corruption error")
MCE_ALEXNET = Metric(name="mce", title="mCE (AlexNet = 100)", scale=Scale.MCE)
MCE_REFERENCE = Metric(name="mce", title="mCE (reference = 100)", scale=Scale.MCE)
ECE = Metric(name="ece", title="calibration error (ECE)", scale=Scale.SHARE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A metric of one model, and its difference from the baseline on the same images."""

    metric: Metric
    value: float
    images: int
    interval: Interval | None = None
    """Interval of the value; None if there are too few images."""
    difference: float | None = None
    """Value minus the baseline's value; None for the baseline."""
    difference_interval: Interval | None = None
    """Paired interval of the difference; None if there are too few images."""
    is_identical: bool = False
    """Whether both models are right on the same images."""

    @property
    def detectable(self) -> float | None:
        """The difference that these images would show in four of five cases; None if unknown."""
        if self.difference_interval is None:
            return None
        return detectable(self.difference_interval)

    @property
    def gain_interval(self) -> Interval | None:
        """The difference's interval with positive numbers for improvements."""
        if self.difference_interval is None or self.metric.higher_is_better:
            return self.difference_interval
        low, high = self.difference_interval
        return -high, -low


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """The measurements of one model."""

    name: str
    facts: Mapping[str, Any]
    measured: Mapping[str, Measured]
    """Name of a metric → measurement."""
    result: Result
    """Its result, with the baseline as the reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Models and their baseline."""

    baseline: Compared
    others: tuple[Compared, ...]
    suite: str
    data: str
    """Name of the dataset: the last two parts of its folder."""
    images: int

    @property
    def models(self) -> tuple[Compared, ...]:
        """All models; the baseline comes first."""
        return (self.baseline, *self.others)

    @property
    def metrics(self) -> dict[str, Metric]:
        """All metrics, by name."""
        return {name: found.metric for model in self.models for name, found in model.measured.items()}


def compare(results: Sequence[Result], attacks: Sequence[AttackResult], baseline: str) -> Comparison:
    """Compare the results of models on one suite with a baseline's.

    Args:
        results: one result per model, with different names.
        attacks: results of attacks on these models; others are ignored.
        baseline: name of the baseline model.

    Raises:
        DataError: no result has the baseline's name, or results are of different images.
    """
    base = next((result for result in results if result["model"]["name"] == baseline), None)
    if base is None:
        names = ", ".join(str(result["model"]["name"]) for result in results)
        raise DataError(f"no model is named {baseline!r}; found {names}")
    own_attacks = {str(attack["model"]["sha256"]): attack for attack in attacks}
    models = [_compared(result, base, own_attacks) for result in results]
    first = next(model for model in models if model.name == baseline)
    cells = base["cells"].values()
    return Comparison(
        baseline=first,
        others=tuple(model for model in models if model is not first),
        suite=str(base["suite"]),
        data=dataset_name(base),
        images=max(cell["images"] for cell in cells),
    )


def _compared(result: Result, base: Result, attacks: Mapping[str, AttackResult]) -> Compared:
    own = _without_reference(result) if result is base else rebase(result, base)
    other = None if result is base else base
    measured = [*_clean(own, other, is_paired=_is_paired(result, base)), *_means(own), *_corruptions(own)]
    attack, compared = (attacks.get(str(item["model"].get("sha256"))) for item in (result, base))
    if attack is not None:
        measured += _attacks(attack, None if result is base else compared)
    return Compared(
        name=str(result["model"]["name"]),
        facts=result["model"],
        measured={found.metric.name: found for found in measured},
        result=own,
    )


def rebase(result: Result, base: Result) -> Result:
    """Return a result that is compared with another result on the same images.

    If the evaluation itself compared the two models, its image-by-image counts are kept. Otherwise
    they are reconstructed from the twenty groups of images: means over groups are exact, and
    `Pairs.only_model` and `only_reference` are lower bounds.

    Raises:
        DataError: the results are of different images.
    """
    why = why_separate(comparable_facts(base), comparable_facts(result), str(base["model"]["name"]))
    if why:
        raise DataError(f"{result['model']['name']} cannot be compared with {base['model']['name']}: {why}")
    if _is_paired(result, base):
        return result
    cells = {}
    for name, cell in result["cells"].items():
        own, other = Counts.from_dict(cell["counts"]), Counts.from_dict(base["cells"][name]["counts"])
        paired = dataclasses.replace(own, pairs=_group_pairs(own, other))
        cells[name] = {**cell, "counts": paired.to_dict()}
    return finished({**result, "reference": base["model"], "cells": cells})


def _without_reference(result: Result) -> Result:
    cells = {}
    for name, cell in result["cells"].items():
        counts = dataclasses.replace(Counts.from_dict(cell["counts"]), pairs=None)
        cells[name] = {**cell, "counts": counts.to_dict()}
    return finished({**result, "reference": None, "cells": cells})


def _is_paired(result: Result, base: Result) -> bool:
    return bool(result["reference"]) and result["reference"].get("sha256") == base["model"].get("sha256")


def _group_pairs(own: Counts, other: Counts) -> Pairs:
    more = [a - b for a, b in zip(own.group_right, other.group_right, strict=True)]
    only_model = sum(max(value, 0) for value in more)
    return Pairs(
        agree=0,
        both=own.top1 - only_model,
        only_model=only_model,
        only_reference=sum(max(-value, 0) for value in more),
        reference_group_right=other.group_right,
    )


def _clean(result: Result, base: Result | None, *, is_paired: bool) -> list[Measured]:
    """Return top-1 and calibration error on uncorrupted images, and their differences."""
    cell = uncorrupted_cell(result)
    if cell is None:
        return []
    own = Counts.from_dict(result["cells"][cell]["counts"])
    found = result["metrics"]["cells"][cell]
    top1 = Measured(
        metric=TOP1, value=100 * found["top1"], interval=_scaled(found["top1_interval"], 100), images=own.images
    )
    if base is None:
        return [top1, _calibration(own, None)]
    other = Counts.from_dict(base["cells"][cell]["counts"])
    pairs = found["against_reference"]
    assert own.pairs is not None
    interval = pairs["top1_difference_interval"] if is_paired else _group_difference(own, other)
    return [
        dataclasses.replace(
            top1,
            difference=100 * pairs["top1_difference"],
            difference_interval=_scaled(interval, 100),
            is_identical=is_paired and own.pairs.only_model == own.pairs.only_reference == 0,
        ),
        _calibration(own, other),
    ]


def _group_difference(own: Counts, other: Counts) -> Interval | None:
    """Return an interval of the accuracy's difference from groups of images."""
    if min(own.group_images) == 0:
        return None

    def difference(groups: Sequence[int]) -> float:
        images = sum(own.group_images[group] for group in groups)
        return sum(own.group_right[group] - other.group_right[group] for group in groups) / images

    found, floor = jackknife(difference, GROUPS), wilson(0, own.images)
    assert found is not None and floor is not None
    middle, half = (found[0] + found[1]) / 2, max((found[1] - found[0]) / 2, floor[1])
    return middle - half, middle + half


def _calibration(own: Counts, other: Counts | None) -> Measured:
    """Return the expected calibration error; its intervals need counts by group."""
    value = grouped_calibration_error(own) if own.group_gap_nano is not None else None
    if value is None or min(own.group_images) == 0:
        alone = calibration_error(own)
        difference = None if other is None else alone - calibration_error(other)
        return Measured(metric=ECE, value=alone, images=own.images, difference=difference)
    interval = jackknife(lambda groups: grouped_calibration_error(own, groups), GROUPS)
    found = Measured(
        metric=ECE, value=value, interval=None if interval is None else _clipped(interval), images=own.images
    )
    if other is None or other.group_gap_nano is None:
        return found
    return dataclasses.replace(
        found,
        difference=value - grouped_calibration_error(other),
        difference_interval=jackknife(
            lambda groups: grouped_calibration_error(own, groups) - grouped_calibration_error(other, groups), GROUPS
        ),
    )


def _clipped(interval: Interval) -> Interval:
    return max(interval[0], 0.0), min(interval[1], 1.0)


def _means(result: Result) -> list[Measured]:
    """Return the mean error and the mCE."""
    metrics, images = result["metrics"], max(cell["images"] for cell in result["cells"].values())
    found = []
    for key, metric, factor in (
        ("mean_error", MEAN_ERROR, 100.0),
        ("mce_reference", MCE_REFERENCE, 1.0),
        ("mce_alexnet", MCE_ALEXNET, 1.0),  # replaces the relative one on ImageNet
    ):
        own = metrics.get(key) or {}
        if own.get("value") is not None:
            found.append(
                Measured(
                    metric=metric,
                    value=factor * own["value"],
                    interval=_scaled(own["interval"], factor),
                    difference=None if own.get("difference") is None else factor * own["difference"],
                    difference_interval=_scaled(own.get("difference_interval"), factor),
                    images=images,
                )
            )
    if metrics.get("mean_error") and not result["reference"] and (metrics.get("mce_alexnet") or {}).get("why_not"):
        found.append(Measured(metric=MCE_REFERENCE, value=100.0, images=images))  # the baseline, by definition
    return found


def _corruptions(result: Result) -> list[Measured]:
    """Return the error under each corruption."""
    images = max(cell["images"] for cell in result["cells"].values())
    return [
        Measured(
            metric=Metric(name=error.name, title=f"error, {error.name.replace('_', ' ')}"),
            value=100 * error.error,
            interval=_scaled(error.interval, 100),
            difference=None if error.difference is None else 100 * error.difference,
            difference_interval=_scaled(error.difference_interval, 100),
            images=images,
        )
        for error in corruption_errors_of(result)
    ]


def _attacks(own: AttackResult, other: AttackResult | None) -> list[Measured]:
    """Return top-1 under each attack at the strongest ε."""
    found = []
    for name, epsilon, right_N in _attacked(own):
        metric = Metric(name=name, title=f"top-1 under {name.upper()}, ε = {epsilon:g}/255", higher_is_better=True)
        images, right = len(right_N), int(right_N.sum())
        measured = Measured(
            metric=metric, value=100 * right / images, interval=_scaled(wilson(right, images), 100), images=images
        )
        same = other is not None and other["names_sha256"] == own["names_sha256"]
        match = [bits for key, eps, bits in (_attacked(other) if same else ()) if (key, eps) == (name, epsilon)]
        if match:
            measured = _paired_attack(measured, right_N, match[0])
        found.append(measured)
    return found


def _paired_attack(measured: Measured, right_N: NDArray[np.bool_], other_N: NDArray[np.bool_]) -> Measured:
    both, more, less = (int(part.sum()) for part in (right_N & other_N, right_N & ~other_N, ~right_N & other_N))
    interval = newcombe_paired(both, more, less, len(right_N) - both - more - less)
    return dataclasses.replace(
        measured,
        difference=100 * (more - less) / len(right_N),
        difference_interval=_scaled(interval, 100),
        is_identical=more == less == 0,
    )


def _attacked(attack: AttackResult | None) -> list[tuple[str, float, NDArray[np.bool_]]]:
    """Return (attack, ε in 1/255, correct images in the order of their paths)."""
    rows = []
    for curve in attack["curves"] if attack else ():
        point = max(curve["points"], key=lambda point: float(point["epsilon"]))
        shown = curve["attack"] not in (UNATTACKED, NOISE) and len(curve.get("of", (1, 2))) > 1
        if attack is not None and shown and "right_bits" in point:
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(point["right_bits"]), np.uint8))
            rows.append((str(curve["attack"]), round(255 * point["epsilon"], 6), bits[: attack["images"]].astype(bool)))
    return rows


def _scaled(interval: Sequence[float] | None, factor: float) -> Interval | None:
    return None if interval is None else (factor * interval[0], factor * interval[1])
