"""Choose the precision of tensors (FP16, BF16 or INT8) from their values on real images.

`advprop calibrate model.onnx --data photos/` writes an INT8 file; `calibrate_file` does the same in
Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.system.lazy import lazy_names

if TYPE_CHECKING:
    from calib.pipeline import CalibratedFile, calibrate_file
    from calib.ptq import Calibrated, calibrate
    from runtime.graph.collect import collect_amax

__all__ = ["Calibrated", "CalibratedFile", "calibrate", "calibrate_file", "collect_amax"]

_HOMES = {
    "Calibrated": "calib.ptq",
    "CalibratedFile": "calib.pipeline",
    "calibrate": "calib.ptq",
    "calibrate_file": "calib.pipeline",
    "collect_amax": "runtime.graph.collect",
}

__getattr__ = lazy_names(__name__, _HOMES)
