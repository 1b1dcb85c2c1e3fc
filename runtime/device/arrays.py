"""`DeviceArray`, an output that stays on the device where the model computed it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CPU", "CUDA", "DeviceArray"]

CPU, CUDA = 1, 2
"""DLPack's device types."""


class DeviceArray:
    """A contiguous array on the GPU that is completely written.

    Pass it to `torch.from_dlpack`, `cupy.asarray` and similar functions, or call `numpy`. The
    memory is freed once this object and all arrays made from it are gone. It outlives the session.
    """

    def __init__(
        self,
        *,
        pointer: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        owner: Any,
        to_host: Callable[[], NDArray[Any]],
        kind: int = CUDA,
    ) -> None:
        """Wrap existing memory.

        Args:
            pointer: address on the first visible GPU.
            shape: dimensions.
            dtype: type of the elements.
            owner: object that keeps the memory alive.
            to_host: copies the memory into a new NumPy array.
            kind: DLPack's device type.
        """
        self.pointer = pointer
        """Address on the GPU."""
        self.shape = shape
        """Dimensions."""
        self.dtype = dtype
        """Type of the elements."""
        self._owner = owner
        self._to_host = to_host
        self._kind = kind

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<DeviceArray {self.dtype} {self.shape}>"

    def numpy(self) -> NDArray[Any]:
        """Copy the array into a new NumPy array."""
        return self._to_host()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3 of the CUDA array interface. Its stream is None, because all work is done."""
        if self._kind == CPU:
            raise AttributeError("this array is in CPU memory")
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "version": 3,
            "stream": None,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._kind, 0

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Return a DLPack capsule. The consumer's `stream` does not need to wait.

        Raises:
            BufferError: the consumer requests a copy or another device.
        """
        if copy or (dl_device is not None and tuple(map(int, dl_device)) != self.__dlpack_device__()):
            raise BufferError("a DeviceArray is exported without a copy, on its own device; use numpy() for a copy")
        from runtime.device.dlpack import Tensor, make_capsule

        tensor = Tensor(
            pointer=self.pointer,
            shape=self.shape,
            strides=None,
            dtype=self.dtype,
            kind=self._kind,
            device=0,
            read_only=False,
        )
        return make_capsule(tensor, self, versioned=max_version is not None and max_version[0] >= 1)
