"""A STAND-IN for TensorRT, which tests how our code calls it. It contains no TensorRT.

`StandInTensorRT` implements the part of the module `tensorrt` that `runtime.backends.tensorrt`
uses, on a `StandInDriver`. Its engine returns the mean of each color. It does not show how the real
TensorRT behaves.
"""

# ruff: noqa: N802  # TensorRT's names

from __future__ import annotations

import ctypes
import enum
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.support.stand_in_driver import StandInDriver


class StandInTensorRT:
    """The module `tensorrt`, with an engine whose logits are the mean of each color."""

    __version__ = "10.13.0.35"

    class TensorIOMode(enum.Enum):
        INPUT = 1
        OUTPUT = 2

    class TensorLocation(enum.Enum):
        DEVICE = 0
        HOST = 1

    class DataType(enum.Enum):
        FLOAT = 0
        HALF = 1
        BF16 = 2

    class ExecutionContextAllocationStrategy(enum.Enum):
        STATIC = 0
        USER_MANAGED = 2

    class CudaGraphStrategy(enum.Enum):
        DISABLED = 0
        WHOLE_GRAPH_CAPTURE = 1

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self, driver: StandInDriver, profiles: Sequence[tuple[tuple[int, ...], ...]], **changes: Any) -> None:
        self.driver = driver
        self.profiles = profiles
        self.changes = changes
        self.engines: list[StandInEngine] = []
        self.contexts = 0
        self.runtime_configs: list[SimpleNamespace] = []
        self.running: set[int] = set()

    def Runtime(self, logger: Any) -> Any:
        def deserialize(plan: bytes) -> Any:
            if plan == b"refused":
                logger.log(self.ILogger.ERROR, "Target GPU SM mismatch: expecting compute 8.9 got compute 8.6")
                return None
            self.engines.append(StandInEngine(self, logger))
            return self.engines[-1]

        return SimpleNamespace(engine_host_code_allowed=False, deserialize_cuda_engine=deserialize)


class StandInEngine:
    """`ICudaEngine`."""

    device_memory_size_v2 = 512

    def __init__(self, trt: StandInTensorRT, logger: Any) -> None:
        self.trt, self.logger = trt, logger
        self.num_optimization_profiles = len(trt.profiles)
        self.outputs = trt.changes.get("outputs", ("logits",))
        self.num_io_tensors = 1 + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return ("input", *self.outputs)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.INPUT if name == "input" else self.trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self.trt.DataType[self.trt.changes.get("dtype", "FLOAT")]

    def get_tensor_location(self, name: str) -> Any:
        return self.trt.TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name != "input":
            return (-1, 3)
        sizes = zip(*(shape for profile in self.trt.profiles for shape in profile), strict=True)
        return tuple(size[0] if len(set(size)) == 1 else -1 for size in sizes)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return list(self.trt.profiles[index])

    def create_runtime_config(self) -> Any:
        self.trt.runtime_configs.append(
            SimpleNamespace(create_runtime_cache=object, set_runtime_cache=lambda cache: True)
        )
        return self.trt.runtime_configs[-1]

    def create_execution_context(self, how: Any) -> Any:
        if self.trt.contexts >= self.trt.changes.get("most_contexts", 99):
            self.logger.log(self.trt.ILogger.ERROR, "OutOfMemory")
            return None
        self.trt.contexts += 1
        return StandInContext(self, how)


class StandInContext:
    """`IExecutionContext`."""

    def __init__(self, engine: StandInEngine, how: Any) -> None:
        self.engine, self.trt, self.how = engine, engine.trt, how
        self.scratch = (0, 0)
        self.profile = -1
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}

    def set_device_memory(self, pointer: int, nbytes: int) -> None:
        assert pointer % 256 == 0 and nbytes >= self.engine.device_memory_size_v2
        self.scratch = (pointer, nbytes)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile, self.shape = index, ()
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self.trt.profiles[self.profile]
        self.shape = shape
        return all(low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True))

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.trt.changes.get("output_shape", (self.shape[0], 3))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address % 256 == 0

    def execute_async_v3(self, stream: int) -> bool:
        driver = self.trt.driver
        if stream in driver.recording and self.trt.changes.get("no_capture"):
            return False
        if self.how is self.trt.ExecutionContextAllocationStrategy.USER_MANAGED:
            driver.find(*self.scratch)
        shape, addresses, scratch = self.shape, dict(self.addresses), self.scratch[0]
        names = self.engine.outputs

        def work() -> None:
            assert scratch not in self.trt.running, "two batches use the same scratch memory at once"
            self.trt.running.add(scratch)
            images = self._array(addresses["input"], shape)
            for name in names:
                self._array(addresses[name], (shape[0], 3))[:] = images.mean((2, 3))
            self.trt.running.remove(scratch)

        driver.enqueue(stream, work)
        return True

    def _array(self, address: int, shape: tuple[int, ...]) -> np.ndarray:
        nbytes = 4 * int(np.prod(shape))
        self.trt.driver.find(address, nbytes)
        memory = memoryview((ctypes.c_ubyte * nbytes).from_address(address))
        return np.frombuffer(memory, np.float32).reshape(shape)
