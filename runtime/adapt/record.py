"""The record of an adaptation, in the adapted file and as a JSON report next to it."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from runtime.adapt.adapt import Adaptation, AdaptConfig

__all__ = ["FORMAT", "adaptation_report", "describe_adaptation", "metadata_record"]

FORMAT = "advprop.adaptation/1"


def metadata_record(result: Adaptation, config: AdaptConfig, source_sha256: str, images_sha256: str) -> dict[str, Any]:
    """Return the record that the adapted file contains."""
    return {
        "format": FORMAT,
        "source_sha256": source_sha256,
        "images": result.images,
        "images_sha256": images_sha256,
        "prior": "auto" if config.prior is None else config.prior,
        "weight": round(result.weight, 6),
        "evidence": round(result.evidence, 6),
        "verdict": result.verdict.name.lower(),
    }


def adaptation_report(result: Adaptation, record: dict[str, Any]) -> dict[str, Any]:
    """Return the report: the record, the predictions before and after, and every layer."""
    return {
        **record,
        "before": dataclasses.asdict(result.before),
        "after": dataclasses.asdict(result.after),
        "agreement": result.agreement,
        "expected_accuracy": result.expected_accuracy,
        "clean": None if result.clean is None else dataclasses.asdict(result.clean),
        "layers": [
            {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in dataclasses.asdict(layer).items()
            }
            for layer in result.layers
        ],
    }


def describe_adaptation(text: str) -> str:
    """Describe the record in a file, for people; damaged records are named as such."""
    try:
        record = json.loads(text)
        prior = "an automatic prior" if record["prior"] == "auto" else f"a prior of {record['prior']:g} images"
        return (
            f"to {record['images']} field images, {prior}, mean weight {record['weight']:.0%}; from the file with "
            f"sha256 {record['source_sha256']}"
        )
    except (ValueError, KeyError, TypeError):
        return "yes, but the record cannot be read"
