"""`DeviceArray`: an output that stays where the model made it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CPU", "CUDA", "DeviceArray"]

CPU, CUDA = 1, 2
"""DLPack's numbers of kinds of device."""


class DeviceArray:
    """Contiguous memory on the GPU, all written, for `torch.from_dlpack`, `cupy.asarray` and the like; or `numpy`.

    The memory is freed when neither this object nor an array made of it is left, also after the session was closed.
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
        """Describes memory.

        Args:
            pointer: its address on the first visible GPU.
            shape: its dimensions.
            dtype: of its elements.
            owner: what must be kept alive for the memory to be there.
            to_host: copies it into a new NumPy array.
            kind: DLPack's number of the kind of device.
        """
        self.pointer = pointer
        """Address on the GPU."""
        self.shape = shape
        """Dimensions."""
        self.dtype = dtype
        """Of the elements."""
        self._owner = owner
        self._to_host = to_host
        self._kind = kind

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<DeviceArray {self.dtype} {self.shape}>"

    def numpy(self) -> NDArray[Any]:
        """Copies it into a new NumPy array."""
        return self._to_host()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3; stream None: nothing writes the memory any more."""
        if self._kind == CPU:
            raise AttributeError("this array is in the CPU's memory")
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
        """Makes a capsule. The consumer's `stream` has nothing to wait for. Raises BufferError for copies."""
        if copy or (dl_device is not None and tuple(map(int, dl_device)) != self.__dlpack_device__()):
            raise BufferError("a DeviceArray is given as it is, where it is; use numpy() for a copy")
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
