"""`Prediction`: what a model's outputs say about an image.

Shape suffixes: N images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import SpecError
from runtime.spec import ModelSpec

__all__ = ["Prediction", "predictions_of", "softmax"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one image."""

    label: str
    """Name of the most probable class."""
    probability: float
    """Its probability, in [0, 1]."""
    index: int
    """Its position among the model's classes."""
    probabilities: NDArray[np.float32]
    """All probabilities, (K,), in the order of `Session.spec.classes`; of a `topk` file the
    largest few, the largest first."""
    indices: NDArray[np.int64]
    """The classes that the probabilities belong to: 0 to K − 1 but for a `topk` file."""

    def top(self, count: int) -> list[tuple[int, float]]:
        """Returns the `count` most probable classes, or as many as there are: index and probability."""
        best = (-self.probabilities).argsort(kind="stable")[:count]
        return [(int(self.indices[place]), float(self.probabilities[place])) for place in best]


def predictions_of(outputs: tuple[NDArray[Any], ...], spec: ModelSpec) -> list[Prediction]:
    """Reads a model's outputs, (N, K) each, as `spec.output_form` says.

    Raises:
        SpecError: the spec names another number of classes.
    """
    answers_NK, *classes = outputs
    probabilities_NK = softmax(answers_NK) if spec.output_form == "logits" else answers_NK.astype(np.float32)
    if classes:
        indices_NK = classes[0]
    else:
        _check_classes(probabilities_NK, spec)
        indices_NK = np.broadcast_to(np.arange(len(spec.classes)), probabilities_NK.shape)
    return [_prediction(*rows, spec) for rows in zip(probabilities_NK, indices_NK, strict=True)]


def softmax(logits_NK: NDArray[Any]) -> NDArray[np.float32]:
    """Returns probabilities, (N, K), computed in float64 so that they sum to one."""
    logits_NK = logits_NK.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf − inf: the probabilities are nan, as they should be
        odds_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
    probabilities_NK: NDArray[np.float32] = (odds_NK / odds_NK.sum(axis=1, keepdims=True)).astype(np.float32)
    return probabilities_NK


def _check_classes(probabilities_NK: NDArray[np.float32], spec: ModelSpec) -> None:
    outputs = probabilities_NK.shape[1]
    if outputs != len(spec.classes):
        raise SpecError(f"the model has {outputs} outputs but its spec names {len(spec.classes)} classes")


def _prediction(probabilities_K: NDArray[np.float32], indices_K: NDArray[np.int64], spec: ModelSpec) -> Prediction:
    place = int(probabilities_K.argmax())
    index = int(indices_K[place])
    return Prediction(spec.classes[index], float(probabilities_K[place]), index, probabilities_K, indices_K)
