"""`Machine`, an engine on a stand-in for the GPU; see the other stand_in_*.py."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends.options import EngineOptions
from runtime.backends.tensorrt.backend import TensorRTBackend
from runtime.backends.tensorrt.validation import ValidatedEngine
from runtime.device.driver import Cuda
from runtime.device.views import DeviceView
from runtime.engine.flavors import Flavor
from runtime.engine.sidecar import EngineInfo
from runtime.system.gpu import Gpu
from tests.support.serving_models import SPEC
from tests.support.stand_in_driver import StandInDriver
from tests.support.stand_in_tensorrt import StandInTensorRT

ONE = [((1, 3, 4, 4), (4, 3, 4, 4), (8, 3, 4, 4))]


class Machine:
    """A stand-in for a GPU with one loaded engine."""

    def __init__(
        self,
        profiles: Sequence[tuple[tuple[int, ...], ...]] = ONE,
        *,
        flavor: str = "tensorrt",
        plan: bytes = b"plan",
        total: int = 1 << 30,
        changes: dict[str, Any] | None = None,
        driver: StandInDriver | None = None,
        **options: Any,
    ) -> None:
        self.driver = driver or StandInDriver(total)
        self.trt = StandInTensorRT(self.driver, profiles, **(changes or {}))
        info = EngineInfo(
            plan_sha256=hashlib.sha256(plan).hexdigest(),
            onnx_sha256="",
            flavor=flavor,
            version=self.trt.__version__,
            compute_capabilities=("sm_89",),
            gpu="",
            profiles=(),
            flags=(),
            precision="fp32",
            precision_shares={"fp32": 1.0},
            calibration_sha256="",
            spec=SPEC,
        )
        validated = ValidatedEngine(plan, info, Flavor(flavor, self.trt), Gpu("stand-in", (8, 9)))
        self.cuda = Cuda(self.driver)
        self.backend = TensorRTBackend(validated, Path("m.engine"), self.cuda, EngineOptions(**options))
        self.driver.counts.clear()

    def count(self, name: str) -> int:
        """Return how often a driver function was called since the engine was loaded."""
        return self.driver.counts.get(name, 0)

    def on_gpu(self, images: np.ndarray, owner: Any = None) -> tuple[DeviceView, Any]:
        """Copy images to the stand-in's memory. Return a view, and the memory to keep alive."""
        with self.cuda.current():
            memory = self.cuda.device_memory(images.nbytes, "images")
            self.cuda.copy_to_device(memory.pointer, np.ascontiguousarray(images), 1)
            self.cuda.synchronize(1)
        return DeviceView(memory.pointer, images.shape, images.dtype, owner or memory), memory


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, 4, 4)).astype(np.float32)


def means(batch: np.ndarray) -> np.ndarray:
    return batch.mean((2, 3))
