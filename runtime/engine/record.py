"""`export.json`, which an export leaves beside its files: how each was verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["RECORD", "RECORD_FORMAT", "read_record", "verification"]

RECORD = "export.json"
RECORD_FORMAT = "advprop.export/1"


def read_record(folder: Path) -> dict[str, Any]:
    """Returns the record of `folder`; nothing where there is none that can be read."""
    try:
        content = json.loads((folder / RECORD).read_text())
        fits = content["format"] == RECORD_FORMAT and isinstance(content["files"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return dict(content) if fits else {}


def verification(folder: Path, sha256: str) -> str:
    """Returns in words how the file of that hash was verified; "" where `folder` has no record of it."""
    try:
        for entry in read_record(folder).get("files", {}).values():
            if entry["sha256"] == sha256:
                parity = entry["parity"]
                return (
                    f"against {entry['against']} on {parity['images']} images: max |Δlogit| {parity['max_abs']:.1e}, "
                    f"top-1 agreement {parity['agreement']:.1%}, KL {parity['kl']:.1e}"
                )
    except (ValueError, KeyError, TypeError):  # changed by hand
        return ""
    return ""
