"""What an export leaves beside its models: `export.json`, and the decisions of the reduced precision."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from calib.precision import LIMIT, Decision
from export.verify import Parity
from runtime.engine.record import RECORD, RECORD_FORMAT, read_record
from runtime.graph.read import sha256_onnx
from runtime.system.files import write_text

__all__ = ["save_decisions", "save_record"]


def save_decisions(path: Path, decisions: Sequence[Decision], amax: Mapping[str, float], parity: Parity) -> None:
    """Writes which nodes stay in FP32 and why, and every measured range, the largest first."""
    content = {
        "format": "advprop.reduced/1",
        "limit": LIMIT,
        "parity": _plain(parity),
        "kept_fp32": [dataclasses.asdict(decision) | {"amax": _number(decision.amax)} for decision in decisions],
        "amax": {name: _number(amax[name]) for name in sorted(amax, key=lambda name: -amax[name])},
    }
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def save_record(folder: Path, checkpoint_sha256: str, stages: Sequence[tuple[Path, str, Parity]]) -> None:
    """Writes how each file was verified: (file, what it was compared with, how they compare).

    What an earlier export of the same checkpoint wrote there of other files stays.
    """
    earlier = read_record(folder)
    files = earlier["files"] if earlier.get("checkpoint_sha256") == checkpoint_sha256 else {}
    content = {
        "format": RECORD_FORMAT,
        "checkpoint_sha256": checkpoint_sha256,
        "files": files
        | {
            path.name: {"sha256": sha256_onnx(path), "against": against, "parity": _plain(parity)}
            for path, against, parity in stages
        },
    }
    write_text(folder / RECORD, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _plain(parity: Parity) -> dict[str, float | None]:
    return {name: _number(value) for name, value in dataclasses.asdict(parity).items()}


def _number(value: float) -> float | None:
    """JSON has no word for what is not finite: null."""
    return value if math.isfinite(value) else None
