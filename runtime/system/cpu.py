"""Detect the usable cores and the INT8 arithmetic of the CPU."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

__all__ = ["has_exact_int8", "parse_exact_int8", "usable_cores"]

_EXACT_INT8_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
"""Flags of CPUs that accumulate INT8 products in 32 bits: VNNI and AMX on x86, dot products on
ARM."""


def usable_cores() -> int:
    """Return the number of logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache
def has_exact_int8() -> bool | None:
    """Return whether ONNX Runtime's INT8 kernels are exact on this CPU, or None if it is unknown.

    Without VNNI, x86 CPUs add pairs of products in 16 bits, which saturates.
    """
    try:
        return parse_exact_int8(Path("/proc/cpuinfo").read_text())
    except OSError:
        return None


def parse_exact_int8(cpuinfo: str) -> bool | None:
    """Return `has_exact_int8` for the text of a `/proc/cpuinfo`, or None if it lists no flags."""
    flags = {
        flag
        for line in cpuinfo.splitlines()
        if line.lower().startswith(("flags", "features"))
        for flag in line.partition(":")[2].split()
    }
    return bool(flags & set(_EXACT_INT8_FLAGS)) if flags else None
