"""Run exported classifiers: `import runtime; runtime.load("model.onnx").predict(["a.jpg"])`.

Importing this package loads NumPy and nothing heavier. The libraries of a backend are imported when
a session or a build first needs them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from runtime import errors
from runtime.backends.options import EngineOptions, Threads
from runtime.batching.batcher import Batching
from runtime.device.arrays import DeviceArray
from runtime.loading import load
from runtime.session import Prediction, Session, SessionStats
from runtime.spec import ImageSizes, ModelSpec, Preprocessing
from runtime.system.lazy import lazy_names

if TYPE_CHECKING:
    from runtime.engine.build import build
    from runtime.engine.options import BuildOptions

__all__ = [
    "Batching",
    "BuildOptions",
    "DeviceArray",
    "EngineOptions",
    "ImageSizes",
    "ModelSpec",
    "Prediction",
    "Preprocessing",
    "Session",
    "SessionStats",
    "Threads",
    "build",
    "errors",
    "load",
]

# ONNX Runtime 1.29 and later send names and hashes of models to Microsoft, unless this is set before
# their first import (https://github.com/microsoft/onnxruntime/pull/27379).
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# A service that only runs models does not load the code that builds engines.
__getattr__ = lazy_names(__name__, {"BuildOptions": "runtime.engine.options", "build": "runtime.engine.build"})
