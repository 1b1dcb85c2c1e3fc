"""Accuracy and confidence on clean images, recorded at export: how far confidence is from accuracy.

Shape suffixes: N images, K classes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from runtime.graph.structure import metadata, set_metadata
from runtime.session import softmax

__all__ = ["CONFIDENCE_KEY", "CleanConfidence", "confidence_of", "probabilities", "read_confidence", "with_confidence"]

CONFIDENCE_KEY = "advprop.confidence"
"""Key of the record in an ONNX file's `metadata_props`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanConfidence:
    """A model's accuracy and confidence on labeled clean images."""

    images: int
    """Number of images."""
    top1: float
    """Top-1 accuracy, 0 to 1."""
    confidence: float
    """Mean probability of the predicted class, 0 to 1."""

    def expected_accuracy(self, confidence: float) -> float:
        """Return the accuracy that a mean confidence on other images suggests, 0 to 1.

        It assumes that confidence and accuracy differ by as much as on the clean images.
        """
        return min(1.0, max(0.0, confidence + self.top1 - self.confidence))


def probabilities(outputs_NK: NDArray[np.floating], output_form: str) -> NDArray[np.float64]:
    """Return probabilities of logits, or of probabilities if `output_form` is `probs`."""
    found = outputs_NK if output_form == "probs" else softmax(outputs_NK)
    return found.astype(np.float64)


def confidence_of(
    outputs_NK: NDArray[np.floating], labels_N: NDArray[np.integer], output_form: str = "logits"
) -> CleanConfidence:
    """Return accuracy and confidence of a model's outputs for labeled images."""
    return CleanConfidence(
        images=len(labels_N),
        top1=float((outputs_NK.argmax(1) == labels_N).mean()),
        confidence=float(probabilities(outputs_NK, output_form).max(1).mean()),
    )


def with_confidence(
    model: onnx.ModelProto, logits_NK: NDArray[np.floating], labels_N: NDArray[np.integer]
) -> onnx.ModelProto:
    """Return a copy of the model that records its accuracy and confidence on labeled images."""
    record = confidence_of(logits_NK, labels_N)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    set_metadata(result, {CONFIDENCE_KEY: json.dumps(asdict(record), separators=(",", ":"))})
    return result


def read_confidence(model: Any) -> CleanConfidence | None:
    """Return the record of an `onnx.ModelProto`; None if it has none, or a damaged one."""
    try:
        content = json.loads(metadata(model, CONFIDENCE_KEY))
        return CleanConfidence(
            images=int(content["images"]), top1=float(content["top1"]), confidence=float(content["confidence"])
        )
    except (ValueError, KeyError, TypeError):
        return None
