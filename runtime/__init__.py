"""Runs exported classifiers: `import runtime; runtime.load("model.onnx").predict(["a.jpg"])`.

Importing this package loads NumPy and nothing heavier; a backend's library is imported
when a session or a build first needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime import errors
from runtime.backends.engine_options import EngineOptions
from runtime.backends.threads import Threads
from runtime.batching.batcher import Batching
from runtime.device.arrays import DeviceArray
from runtime.loading import load
from runtime.session import Prediction, Session, SessionStats
from runtime.sizes import ImageSizes
from runtime.spec import ModelSpec, Preprocessing
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

# A service that runs models need not load what builds engines.
__getattr__ = lazy_names(__name__, {"BuildOptions": "runtime.engine.options", "build": "runtime.engine.build"})
