"""Detect the GPU through the driver, without any CUDA package."""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass

__all__ = ["Gpu", "find_gpu"]

# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{MAJOR,MINOR}
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first visible GPU."""

    name: str
    """The driver's name for it, e.g. `NVIDIA H100 80GB HBM3`."""
    compute_capability: tuple[int, int]
    """(major, minor), e.g. (9, 0)."""

    @property
    def sm(self) -> int:
        """The compute capability as one number, e.g. 89 for 8.9, as in TensorRT's target names."""
        return self.compute_capability[0] * 10 + self.compute_capability[1]


@functools.cache
def find_gpu() -> Gpu | None:
    """Return the first visible GPU, or None without a driver or GPU.

    No CUDA context is created. The driver respects `CUDA_VISIBLE_DEVICES`.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    count, device = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value < 1:
        return None
    if driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), device)
    capability = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return Gpu(name.value.decode(errors="replace"), (capability[0], capability[1]))
