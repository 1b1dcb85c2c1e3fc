"""Export AdvProp checkpoints to self-describing ONNX files and TensorRT engines.

`advprop-export best.pt --trt fp16` does both; `export_checkpoint` is the same in Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.system.lazy import lazy_names

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

__getattr__ = lazy_names(__name__, _HOMES)
