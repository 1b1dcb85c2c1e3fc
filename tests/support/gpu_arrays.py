"""Objects that look like GPU arrays of other libraries, for tests without a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.device.arrays import CUDA
from runtime.device.dlpack import Tensor, make_capsule

FLOAT = np.dtype(np.float32)


class Interface:
    """Has a `__cuda_array_interface__`, like pycuda's GPUArray."""

    def __init__(self, **changes: Any) -> None:
        self.__cuda_array_interface__ = {
            "shape": (2, 3, 4, 4),
            "typestr": "<f4",
            "data": (4096, False),
            "version": 3,
            **changes,
        }


class Exporter:
    """Has a `__dlpack__`, like arrays of torch and CuPy, and records the requested streams."""

    def __init__(self, shape: tuple[int, ...] = (2, 3, 4, 4), pointer: int = 4096, **changes: Any) -> None:
        fields = {"strides": None, "dtype": FLOAT, "kind": CUDA, "device": 0, "read_only": True, **changes}
        self.tensor = Tensor(pointer=pointer, shape=shape, **fields)
        self.streams: list[int] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.kind, 0

    def __dlpack__(self, *, stream: int, max_version: tuple[int, int]) -> Any:
        self.streams.append(stream)
        return make_capsule(self.tensor, self, versioned=True)


class UnversionedExporter(Exporter):
    """Follows the DLPack protocol from before it had versions."""

    def __dlpack__(self, *, stream: int) -> Any:  # type: ignore[override]  # that is the difference
        self.streams.append(stream)
        return make_capsule(self.tensor, self, versioned=False)
