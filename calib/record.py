"""`NAME.json` beside an INT8 file: what became of every layer, and why."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from calib.config import CalibrationConfig
from calib.ptq import Calibrated
from calib.sensitivity import Fallback
from runtime.system.files import write_text

__all__ = ["save_record"]

FORMAT = "advprop.int8/1"


def save_record(path: Path, calibrated: Calibrated, config: CalibrationConfig, agreement: float, images: int) -> None:
    """Writes the record.

    Args:
        path: the file.
        calibrated: what was made.
        config: what was wished.
        agreement: share of images with the float32 top-1 class, 0 to 1.
        images: their number.

    Raises:
        OutputError: it cannot be written.
    """
    content = {
        "format": FORMAT,
        "config": {name: value for name, value in dataclasses.asdict(config).items() if name != "images"},
        "int8_share_of_macs": calibrated.int8_share,
        "agreement": agreement,
        "compared_images": images,
        "equalized": calibrated.equalized,
        "budget": _budget(calibrated.fallback) if calibrated.fallback else None,
        "nodes": _nodes(calibrated),
    }
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _budget(fallback: Fallback) -> dict[str, Any]:
    return {
        "budget": fallback.budget,
        "met": fallback.met,
        "losses": fallback.chosen.losses,
        "agreement": fallback.chosen.agreement,
        "given_back": list(fallback.chosen.floating),
        "sensitivity": {  # JSON has no word for what is not finite: null
            node: value if math.isfinite(value) else None for node, value in fallback.sensitivity.items()
        },
        "trials": [
            {"given_back": len(trial.floating), "int8_share_of_macs": trial.int8_share, "losses": trial.losses}
            for trial in fallback.trials
        ],
    }


def _nodes(calibrated: Calibrated) -> list[dict[str, Any]]:
    layers = {layer.node: layer for layer in calibrated.layers}
    return [
        dataclasses.asdict(point)
        | {
            "threshold": calibrated.thresholds.get(point.tensor) if point.int8 else None,
            "largest": calibrated.histograms[point.tensor].amax if point.int8 else None,
            "noise": layers[point.node].noise if point.node in layers else None,
        }
        for point in calibrated.points
    ]
