"""`Counts`: the predictions of a model on some images, as integers only.

Integers make the sum of shards equal to a single run byte for byte, because sums of floating-point
numbers depend on their order. Confidences are rounded to billionths before they are added; all
other values are counts.

Shape suffixes: N images, K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError

__all__ = ["BINS", "GROUPS", "NANO", "Answers", "Counts", "Pairs", "answers_of", "count"]

BINS = 15
"""Number of confidence bins of equal width, as in Guo et al., "On Calibration of Modern Neural
Networks" (ICML 2017)."""

GROUPS = 20
"""Number of groups that images are assigned to in turn, for the intervals of
`runtime.evaluate.intervals`."""

NANO = 1_000_000_000
"""Confidences are stored in billionths."""

_MAX_COUNT = 10**21

Row = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Comparison of a model with the reference model on the same images."""

    agree: int
    """Images for which both predict the same class, right or wrong."""
    both: int
    """Images that both classify correctly."""
    only_model: int
    """Images that only the model classifies correctly."""
    only_reference: int
    """Images that only the reference classifies correctly."""
    reference_group_right: Row
    """Images that the reference classifies correctly, by group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The predictions of a model on some images, as counts."""

    images: int
    """Number of images."""
    top1: int
    """Images whose true class has the highest logit."""
    top5: int
    """Images whose true class is among the five highest logits."""
    not_finite: int
    """Images with an infinite logit or a nan. They count as wrong, with a confidence of 0."""
    bin_images: Row
    """Images by confidence bin, from low to high."""
    bin_right: Row
    """Correctly classified images by confidence bin."""
    bin_confidence_nano: Row
    """Sum of the confidences by confidence bin, in billionths."""
    group_images: Row
    """Images by group."""
    group_right: Row
    """Correctly classified images by group."""
    pairs: Pairs | None = None
    """Comparison with the reference model; None without a reference."""
    group_gap_nano: Row | None = None
    """Sum of correctness (0 or 1) minus confidence, in billionths, by group and confidence bin: GROUPS
    rows of BINS. It allows an interval of the calibration error. Only uncorrupted images have it."""
    adapted: int | None = None
    """Images that an adapted model predicted: all or none of a cell, as its verdict says. None for
    models that are not adapted to each cell."""

    def __add__(self, other: Counts) -> Counts:
        if (self.pairs is None) != (other.pairs is None):
            raise InputError("cannot add counts with a reference model to counts without one")
        if (self.group_gap_nano is None) != (other.group_gap_nano is None):
            raise InputError("cannot add counts with calibration by group to counts without it; evaluate again")
        if (self.adapted is None) != (other.adapted is None):
            raise InputError("cannot add counts with verdicts on adaptation to counts without them; evaluate again")
        return Counts(**_sum(self, other))

    @classmethod
    def none(cls, reference: bool = False, calibration: bool = False, adapted: bool = False) -> Counts:
        """Return the counts of no images.

        Args:
            reference: include a comparison with a reference.
            calibration: include the calibration by group.
            adapted: include the number of images that an adapted model predicted.
        """
        bins, groups = (0,) * BINS, (0,) * GROUPS
        pairs = Pairs(agree=0, both=0, only_model=0, only_reference=0, reference_group_right=groups)
        return cls(
            images=0,
            top1=0,
            top5=0,
            not_finite=0,
            bin_images=bins,
            bin_right=bins,
            bin_confidence_nano=bins,
            group_images=groups,
            group_right=groups,
            pairs=pairs if reference else None,
            group_gap_nano=(0,) * (GROUPS * BINS) if calibration else None,
            adapted=0 if adapted else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        content = dataclasses.asdict(self)
        optional = ("group_gap_nano", "adapted")
        return {key: value for key, value in content.items() if value is not None or key not in optional}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Read the values of `to_dict`, also after a round trip through JSON.

        Raises:
            InputError: a value is missing or invalid.
        """
        try:
            fields = _rows(content)
            pairs = fields.pop("pairs")
            counts = cls(**fields, pairs=None if pairs is None else Pairs(**_rows(pairs)))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"expected counts of an evaluation: {error}") from error
        for field in ("bin_images", "group_images"):
            if sum(getattr(counts, field)) != counts.images:
                raise InputError(f"expected counts of an evaluation: {field} do not add up to {counts.images} images")
        if (counts.adapted or 0) > counts.images:
            raise InputError(f"expected counts of an evaluation: adapted is more than the {counts.images} images")
        return counts


def _rows(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return `content` with its lists as tuples, after checking their lengths and all numbers."""
    fields = {key: tuple(value) if isinstance(value, list | tuple) else value for key, value in content.items()}
    for key, value in fields.items():
        length = BINS if key.startswith("bin_") else GROUPS if "group_" in key else None
        length, lowest = (GROUPS * BINS, -_MAX_COUNT) if key == "group_gap_nano" else (length, 0)
        numbers = (value,) if length is None and key != "pairs" else value
        if key != "pairs" and not all(type(number) is int and lowest <= number <= _MAX_COUNT for number in numbers):
            raise ValueError(f"{key} must be whole numbers" + (" of at least 0" if lowest == 0 else ""))
        if length is not None and len(numbers) != length:
            raise ValueError(f"{key} must be {length} numbers; found {len(numbers)}")
    return fields


def _sum(left: Any, right: Any) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for field in dataclasses.fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, tuple):
            total[field.name] = tuple(x + y for x, y in zip(a, b, strict=True))
        elif isinstance(a, Pairs):
            total[field.name] = Pairs(**_sum(a, b))
        else:
            total[field.name] = None if a is None else a + b
    return total


@dataclass(frozen=True, slots=True)
class Answers:
    """The predictions of a model for a batch."""

    classes_N: NDArray[np.int64]
    """Predicted class, as a position among all classes; −1 if the logits are not finite."""
    right_N: NDArray[np.bool_]
    """Whether the predicted class is the true one."""
    top5_N: NDArray[np.bool_]
    """Whether the true class is among the five highest logits."""
    confidence_nano_N: NDArray[np.int64]
    """Probability of the predicted class, in billionths."""


def answers_of(logits_NK: NDArray[Any], labels_N: NDArray[np.int64], classes: Sequence[int] | None = None) -> Answers:
    """Return the predictions for a batch of logits.

    Equal logits rank in the order of the classes, as in `argmax`.

    Args:
        logits_NK: logits of all the model's classes.
        labels_N: true classes, as positions among all classes.
        classes: the classes that compete, such as the 200 of ImageNet-A. All other logits are
            removed before ranking and softmax (default: all classes).
    """
    chosen_K = np.arange(logits_NK.shape[1]) if classes is None else np.asarray(classes)
    logits_NK = logits_NK[:, chosen_K].astype(np.float64)
    place_N = np.asarray([np.flatnonzero(chosen_K == label)[0] for label in labels_N], np.int64)
    finite_N = np.isfinite(logits_NK).all(1)
    logits_NK = np.where(finite_N[:, None], logits_NK, 0.0)
    own_N1 = np.take_along_axis(logits_NK, place_N[:, None], 1)
    earlier_NK = np.arange(len(chosen_K)) < place_N[:, None]
    rank_N = ((logits_NK > own_N1) | ((logits_NK == own_N1) & earlier_NK)).sum(1)
    odds_NK = np.exp(logits_NK - logits_NK.max(1, keepdims=True))
    confidence_N = np.where(finite_N, odds_NK.max(1) / odds_NK.sum(1), 0.0)
    return Answers(
        np.where(finite_N, chosen_K[logits_NK.argmax(1)], -1),
        (rank_N == 0) & finite_N,
        (rank_N < 5) & finite_N,
        np.rint(confidence_N * NANO).astype(np.int64),
    )


def count(
    answers: Answers, positions_N: NDArray[np.int64], reference: Answers | None = None, *, calibration: bool = False
) -> Counts:
    """Return the counts of a batch.

    Args:
        answers: the model's predictions.
        positions_N: positions of the images in their test set, which determine their groups.
        reference: the reference model's predictions for the same images.
        calibration: include the calibration by group.
    """
    right_N = answers.right_N
    # The bins are (0, 1/15], (1/15, 2/15], …; a confidence of 0 belongs to the first.
    bins_N = np.clip(-(-answers.confidence_nano_N * BINS // NANO) - 1, 0, BINS - 1)
    groups_N = positions_N % GROUPS
    pairs = None
    if reference is not None:
        pairs = Pairs(
            agree=int(((answers.classes_N == reference.classes_N) & (answers.classes_N >= 0)).sum()),
            both=int((right_N & reference.right_N).sum()),
            only_model=int((right_N & ~reference.right_N).sum()),
            only_reference=int((~right_N & reference.right_N).sum()),
            reference_group_right=_histogram(groups_N[reference.right_N], GROUPS),
        )
    return Counts(
        images=len(right_N),
        top1=int(right_N.sum()),
        top5=int(answers.top5_N.sum()),
        not_finite=int((answers.classes_N < 0).sum()),
        bin_images=_histogram(bins_N, BINS),
        bin_right=_histogram(bins_N[right_N], BINS),
        bin_confidence_nano=tuple(int(answers.confidence_nano_N[bins_N == place].sum()) for place in range(BINS)),
        group_images=_histogram(groups_N, GROUPS),
        group_right=_histogram(groups_N[right_N], GROUPS),
        pairs=pairs,
        group_gap_nano=_gaps(answers, groups_N * BINS + bins_N) if calibration else None,
    )


def _gaps(answers: Answers, places_N: NDArray[np.int64]) -> Row:
    sums = np.zeros(GROUPS * BINS, np.int64)
    np.add.at(sums, places_N, np.where(answers.right_N, NANO, 0) - answers.confidence_nano_N)
    return tuple(sums.tolist())


def _histogram(places_N: NDArray[np.int64], length: int) -> Row:
    return tuple(np.bincount(places_N, minlength=length).tolist())
