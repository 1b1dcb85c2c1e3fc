"""`Prediction`, the classes and probabilities of one image.

Shape suffixes: N images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.errors import SpecError
from runtime.spec import ModelSpec

__all__ = ["Prediction", "RankedClass", "predictions_of", "softmax"]


class RankedClass(NamedTuple):
    """One of the most probable classes of an image."""

    label: str
    """Name of the class."""
    probability: float
    """Its probability, in [0, 1]."""
    index: int  # type: ignore[assignment]  # hides tuple.index
    """Its index in `Session.spec.classes`."""


@dataclass(frozen=True, slots=True, repr=False)
class Prediction:
    """The result for one image. Results are equal if label, probability and index are."""

    label: str
    """Name of the most probable class."""
    probability: float
    """Probability of that class, in [0, 1]."""
    index: int
    """Index of that class."""
    probabilities: NDArray[np.float32] = field(compare=False)
    """(K,) probabilities in the order of `Session.spec.classes`. A `topk` file returns only the
    largest ones, sorted in decreasing order."""
    indices: NDArray[np.int64] = field(compare=False)
    """(K,) class index of each probability: 0 to K − 1, except for a `topk` file."""
    classes: tuple[str, ...] = field(compare=False)
    """Names of all classes of the model, by index."""

    def top(self, count: int = 5) -> list[RankedClass]:
        """Return the `count` most probable classes, or all if there are fewer, best first."""
        best = (-self.probabilities).argsort(kind="stable")[:count]
        indices = [int(self.indices[place]) for place in best]
        return [
            RankedClass(self.classes[index], float(self.probabilities[place]), index)
            for index, place in zip(indices, best, strict=True)
        ]

    def to_dict(self, top: int = 5) -> dict[str, Any]:
        """Return plain values for JSON: label, probability, index, and the `top` best classes."""
        return {
            "label": self.label,
            "probability": self.probability,
            "index": self.index,
            "top": [ranked._asdict() for ranked in self.top(top)],
        }

    def __repr__(self) -> str:
        ranked = ", ".join(f"{label!r} {probability:.1%}" for label, probability, _ in self.top(3))
        more = ", …" if len(self.probabilities) > 3 else ""
        return f"<Prediction {ranked}{more}>"


def predictions_of(outputs: tuple[NDArray[Any], ...], spec: ModelSpec) -> list[Prediction]:
    """Interpret a model's outputs, (N, K) each, according to `spec.output_form`.

    Raises:
        SpecError: the number of outputs differs from the number of classes in the spec.
    """
    first_NK, *classes = outputs
    probabilities_NK = softmax(first_NK) if spec.output_form == "logits" else first_NK.astype(np.float32)
    if classes:
        indices_NK = classes[0]
    else:
        _check_classes(probabilities_NK, spec)
        indices_NK = np.broadcast_to(np.arange(len(spec.classes)), probabilities_NK.shape)
    return [_prediction(*rows, spec) for rows in zip(probabilities_NK, indices_NK, strict=True)]


def softmax(logits_NK: NDArray[Any]) -> NDArray[np.float32]:
    """Return probabilities, (N, K). They are computed in float64, which makes them sum to one."""
    logits_NK = logits_NK.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf − inf is NaN, the correct result
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
    return Prediction(
        spec.classes[index], float(probabilities_K[place]), index, probabilities_K, indices_K, spec.classes
    )
