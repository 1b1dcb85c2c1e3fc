"""`export.json`, which an export leaves beside its files: how each was verified."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["RECORD", "RECORD_FORMAT", "verification"]

RECORD = "export.json"
RECORD_FORMAT = "advprop.export/1"


def verification(folder: Path, sha256: str) -> str:
    """Returns in words how the file of that hash was verified; "" where `folder` has no record of it."""
    try:
        content = json.loads((folder / RECORD).read_text())
        if content["format"] != RECORD_FORMAT:
            return ""
        for entry in content["files"].values():
            if entry["sha256"] == sha256:
                parity = entry["parity"]
                return (
                    f"against {entry['against']} on {parity['images']} images: max |Δlogit| {parity['max_abs']:.1e}, "
                    f"top-1 agreement {parity['agreement']:.1%}, KL {parity['kl']:.1e}"
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    return ""
