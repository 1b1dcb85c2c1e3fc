"""Decide from unlabeled images whether adapting a classifier to them can be expected to help.

Shape suffixes: N images, K classes.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.adapt.confidence import CleanConfidence, probabilities
from runtime.adapt.estimate import Layer

__all__ = ["MIN_IMAGES", "CleanCheck", "Predictions", "Verdict", "mean_evidence", "predictions_of", "verdict_of"]

MIN_IMAGES = 8
"""Fewest images that can show a shift."""
MIN_EVIDENCE = 0.15
"""Mean evidence of the layers below which the images are not shifted. It was chosen with the
corruptions that mCE does not use; clean images stay below 0.05."""
_ONE_CLASS_SHARE = {2: 0.95, 3: 0.8}
"""Number of classes → share of the most frequent prediction from which images count as one class."""
_DEFAULT_SHARE = 0.5


class Verdict(enum.Enum):
    """Whether to adapt, and why."""

    ADAPT = "adapt"
    LARGER_PRIOR = "adapt with a larger prior"
    NOT_SHIFTED = "do not adapt: not shifted"
    TOO_FEW = "do not adapt: too few images"
    ONE_CLASS = "do not adapt: one class"
    CLEAN_LOSS = "do not adapt: loss on clean images"

    @property
    def adapts(self) -> bool:
        """Whether adapting is expected to help."""
        return self in (Verdict.ADAPT, Verdict.LARGER_PRIOR)


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """What a model predicts for the field images."""

    confidence: float
    """Mean probability of the predicted class, 0 to 1."""
    entropy: float
    """Mean entropy of the probabilities, in nats."""
    top_share: float
    """Share of the images for which the most frequently predicted class is predicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanCheck:
    """What adapting costs on clean images."""

    before: CleanConfidence
    """Accuracy and confidence of the original model."""
    after: CleanConfidence
    """Accuracy and confidence of the adapted model."""

    @property
    def loss(self) -> float:
        """Lost top-1 accuracy, in percentage points."""
        return 100 * (self.before.top1 - self.after.top1)


def predictions_of(outputs_NK: NDArray[np.floating], output_form: str) -> Predictions:
    """Summarize logits, or probabilities if `output_form` is `probs`."""
    probabilities_NK = probabilities(outputs_NK, output_form)
    entropy = -(probabilities_NK * np.log(np.maximum(probabilities_NK, 1e-30))).sum(1).mean()
    counts_K = np.bincount(outputs_NK.argmax(1), minlength=outputs_NK.shape[1])
    return Predictions(
        confidence=float(probabilities_NK.max(1).mean()),
        entropy=float(entropy),
        top_share=float(counts_K.max() / len(outputs_NK)),
    )


def mean_evidence(layers: Sequence[Layer]) -> float:
    """Return the mean evidence of a shift over the layers, 0 to 1."""
    return float(np.mean([layer.evidence for layer in layers])) if layers else 0.0


def verdict_of(layers: Sequence[Layer], before: Predictions, after: Predictions, images: int, classes: int) -> Verdict:
    """Return the verdict, without a look at clean images.

    Args:
        layers: the normalized tensors on the field images.
        before: predictions of the original model.
        after: predictions of the adapted model.
        images: number of field images.
        classes: number of the model's classes.
    """
    if images < MIN_IMAGES:
        return Verdict.TOO_FEW
    # A corrupted image set can look like one class before the adaptation, but not after it.
    if min(before.top_share, after.top_share) >= _ONE_CLASS_SHARE.get(classes, _DEFAULT_SHARE):
        return Verdict.ONE_CLASS
    return Verdict.ADAPT if mean_evidence(layers) >= MIN_EVIDENCE else Verdict.NOT_SHIFTED
