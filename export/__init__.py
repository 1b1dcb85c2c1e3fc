"""From an AdvProp checkpoint to a lean, self-describing ONNX file and a TensorRT engine.

`advprop-export ckpt.pt --trt fp16` does all of it; `export_checkpoint` is the same in
Python.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.pipeline import ExportResult, export_checkpoint
    from export.source import Source, load_source

__all__ = ["ExportResult", "Source", "export_checkpoint", "load_source"]

_HOMES = {
    "ExportResult": "export.pipeline",
    "Source": "export.source",
    "export_checkpoint": "export.pipeline",
    "load_source": "export.source",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'export' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
