"""What the CPU can do."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

__all__ = ["has_exact_int8", "tells_exact_int8"]

_EXACT = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
"""Flags of CPUs that sum INT8 products in 32 bits: VNNI and AMX on x86, dot products on ARM."""


@lru_cache
def has_exact_int8() -> bool | None:
    """Tells whether ONNX Runtime's INT8 kernels are exact on this CPU; None where it cannot be told.

    On x86 CPUs without VNNI pairs of products are summed in 16 bits, and saturate.
    """
    try:
        return tells_exact_int8(Path("/proc/cpuinfo").read_text())
    except OSError:
        return None


def tells_exact_int8(cpuinfo: str) -> bool | None:
    """Reads it from the text of `/proc/cpuinfo`."""
    flags = {
        flag
        for line in cpuinfo.splitlines()
        if line.lower().startswith(("flags", "features"))
        for flag in line.partition(":")[2].split()
    }
    return bool(flags & set(_EXACT)) if flags else None
