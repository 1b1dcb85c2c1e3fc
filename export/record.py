"""Read and write the records of an export: `export.json`, and the nodes that stay in FP32."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.graph.read import sha256_onnx
from runtime.system.files import write_text

if TYPE_CHECKING:
    from calib.precision import Decision
    from export.verify import Parity

__all__ = ["read_record", "save_decisions", "save_record", "verification"]

RECORD = "export.json"
RECORD_FORMAT = "advprop.export/1"


def save_decisions(path: Path, decisions: Sequence[Decision], amax: Mapping[str, float], parity: Parity) -> None:
    """Write which nodes stay in FP32 and why, and the measured ranges in descending order.

    Raises:
        OutputError: the file cannot be written.
    """
    from calib.precision import LIMIT

    content = {
        "format": "advprop.reduced/1",
        "limit": LIMIT,
        "parity": _plain(parity),
        "kept_fp32": [
            dataclasses.asdict(decision) | {"amax": _finite_or_none(decision.amax)} for decision in decisions
        ],
        "amax": {name: _finite_or_none(amax[name]) for name in sorted(amax, key=lambda name: -amax[name])},
    }
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def save_record(
    folder: Path,
    checkpoint_sha256: str,
    stages: Sequence[tuple[Path, str, Parity]],
    *,
    reparameterized: bool = False,
) -> None:
    """Record the verification of exported files. Entries of this checkpoint's other files stay.

    Args:
        folder: folder of the exported files.
        checkpoint_sha256: hash of the checkpoint.
        stages: (file, name of the reference, comparison with the reference) of each file.
        reparameterized: whether the files hold the re-parameterized network.

    Raises:
        OutputError: the record cannot be written.
    """
    earlier = read_record(folder)
    form = {"reparameterized": True} if reparameterized else {}
    files = earlier["files"] if earlier.get("checkpoint_sha256") == checkpoint_sha256 else {}
    content = {
        "format": RECORD_FORMAT,
        "checkpoint_sha256": checkpoint_sha256,
        "files": files
        | {
            path.name: {"sha256": sha256_onnx(path), "against": against, "parity": _plain(parity), **form}
            for path, against, parity in stages
        },
    }
    write_text(folder / RECORD, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record in `folder`, or {} if it is missing or invalid."""
    try:
        content = json.loads((folder / RECORD).read_text())
        valid = content["format"] == RECORD_FORMAT and isinstance(content["files"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return dict(content) if valid else {}


def verification(folder: Path, sha256: str) -> str:
    """Describe the verification of the file with this hash; "" if `folder` has no record of it."""
    try:
        for entry in read_record(folder).get("files", {}).values():
            if entry["sha256"] == sha256:
                parity = entry["parity"]
                form = ", re-parameterized" if entry.get("reparameterized") else ""
                return (
                    f"against {entry['against']} on {parity['images']} images: max |Δlogit| {parity['max_abs']:.1e}, "
                    f"top-1 agreement {parity['agreement']:.1%}, KL {parity['kl']:.1e}{form}"
                )
    except (ValueError, KeyError, TypeError):  # the record was edited
        return ""
    return ""


def _plain(parity: Parity) -> dict[str, float | None]:
    return {name: _finite_or_none(value) for name, value in dataclasses.asdict(parity).items()}


def _finite_or_none(value: float) -> float | None:
    """Return a finite value unchanged and None otherwise: JSON cannot represent inf or nan."""
    return value if math.isfinite(value) else None
