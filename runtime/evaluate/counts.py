"""What is kept of an evaluation: whole numbers only, so that shards add up to the very bytes of one run.

Shape suffixes: N images, K classes.

Sums of floating-point numbers depend on their order. Confidences are therefore rounded to whole billionths before they
are added, and everything else is a count.
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
"""Bins of equal width that confidences are sorted into, as in Guo et al., "On Calibration of Modern Neural Networks"
(ICML 2017)."""

GROUPS = 20
"""Groups that images are dealt into in turn, for the intervals of `runtime.evaluate.intervals`."""

NANO = 1_000_000_000
"""Confidences are kept in billionths."""

Row = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """One model beside the reference model, on the same images."""

    agree: int
    """Images that both put into the same class, right or wrong."""
    both: int
    """Images that both get right."""
    only_model: int
    """Images that the model gets right and the reference wrong."""
    only_reference: int
    """Images that the reference gets right and the model wrong."""
    reference_group_right: Row
    """Images that the reference gets right, by group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a model answered on some images."""

    images: int
    """How many there were."""
    top1: int
    """Those whose class came out first."""
    top5: int
    """Those whose class came out among the first five."""
    not_finite: int
    """Those with an infinite logit or a nan. They count as wrong, with confidence 0."""
    bin_images: Row
    """By bin of the confidence, from low to high: images,"""
    bin_right: Row
    """those that are right,"""
    bin_confidence_nano: Row
    """and the sum of their confidences, in billionths."""
    group_images: Row
    """By group of images: how many,"""
    group_right: Row
    """and those that are right."""
    pairs: Pairs | None = None
    """Beside the reference model, where there is one."""

    def __add__(self, other: Counts) -> Counts:
        if (self.pairs is None) != (other.pairs is None):
            raise InputError("counts with a reference model cannot be added to counts without one")
        return Counts(**_sum(self, other))

    @classmethod
    def none(cls, reference: bool = False) -> Counts:
        """Counts of no images; `reference`: with those beside a reference model."""
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
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Reads `to_dict`'s values, or what JSON made of them. Raises InputError where they are something else."""
        try:
            fields = _rows(content)
            pairs = fields.pop("pairs")
            return cls(**fields, pairs=None if pairs is None else Pairs(**_rows(pairs)))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"these are not counts of an evaluation: {error}") from error


def _rows(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}


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
    """What a model says about a batch."""

    classes_N: NDArray[np.int64]
    """The class that comes first, among those that are asked about; −1 where the logits are not finite."""
    right_N: NDArray[np.bool_]
    """Whether that is the right one."""
    top5_N: NDArray[np.bool_]
    """Whether the right one is among the first five."""
    confidence_nano_N: NDArray[np.int64]
    """The probability of the first one, in billionths."""


def answers_of(logits_NK: NDArray[Any], labels_N: NDArray[np.int64], classes: Sequence[int] | None = None) -> Answers:
    """Reads a batch of logits.

    Equal logits rank in the order of the classes, as `argmax` has it.

    Args:
        logits_NK: of all the model's classes.
        labels_N: the right classes, as positions among all classes.
        classes: the only classes that are asked about, as ImageNet-A and -R ask about 200: the others' logits are
            left out before anything is ranked or normalized. Default: all.

    Returns:
        Classes as positions among all classes.
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


def count(answers: Answers, positions_N: NDArray[np.int64], reference: Answers | None = None) -> Counts:
    """Counts a batch.

    Args:
        answers: of the model.
        positions_N: the images' positions in their set, from which their groups follow.
        reference: the reference model's answers on the same images.
    """
    right_N = answers.right_N
    # The bins are (0, 1/15], (1/15, 2/15], …; a confidence of 0 goes to the first.
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
    )


def _histogram(places_N: NDArray[np.int64], length: int) -> Row:
    return tuple(np.bincount(places_N, minlength=length).tolist())
