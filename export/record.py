"""What an export leaves beside its models: `export.json`, and the decisions of the reduced precision."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from calib.precision import LIMIT, Decision
from export.verify import Parity
from runtime.engine.graph import sha256_onnx
from runtime.engine.record import RECORD, RECORD_FORMAT
from runtime.files import write_text

__all__ = ["save_decisions", "save_record"]


def save_decisions(path: Path, decisions: Sequence[Decision], amax: Mapping[str, float], parity: Parity) -> None:
    """Writes which nodes stay in FP32 and why, and every measured range, the largest first."""
    content = {
        "format": "advprop.reduced/1",
        "limit": LIMIT,
        "parity": dataclasses.asdict(parity),
        "kept_fp32": [dataclasses.asdict(decision) for decision in decisions],
        "amax": {name: amax[name] for name in sorted(amax, key=lambda name: -amax[name])},
    }
    # A range that is not finite is written as JSON has no word for it: NaN, Infinity.
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def save_record(folder: Path, checkpoint_sha256: str, stages: Sequence[tuple[Path, str, Parity]]) -> None:
    """Writes how each file was verified: (file, what it was compared with, how they compare)."""
    content = {
        "format": RECORD_FORMAT,
        "checkpoint_sha256": checkpoint_sha256,
        "files": {
            path.name: {"sha256": sha256_onnx(path), "against": against, "parity": dataclasses.asdict(parity)}
            for path, against, parity in stages
        },
    }
    write_text(folder / RECORD, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
