"""The GPU before, during and after a run, by nvidia-smi: clocks, temperature, power, and why it was slowed down."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["SLOWED_DOWN", "gpu_state", "reasons_of"]

_FIELDS = {
    "clocks.sm": "sm_mhz",
    "clocks.max.sm": "most_sm_mhz",
    "clocks.mem": "memory_mhz",
    "temperature.gpu": "temperature_c",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "utilization.gpu": "utilization_percent",
}
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""The field's name, and its name in drivers before 535."""
_BITS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal slowdown (software)",
    0x40: "thermal slowdown (hardware)",
    0x80: "power brake",
    0x100: "display clocks",
}
"""Source: NVML, nvmlClocksEventReasons."""
SLOWED_DOWN = frozenset(_BITS[bit] for bit in (0x4, 0x8, 0x20, 0x40, 0x80))
"""The reasons for which a GPU is slower than it could be."""

Ask = Callable[[Sequence[str]], str | None]
"""Runs a command; returns what it printed, or None where it failed."""


def gpu_state(ask: Ask | None = None) -> dict[str, Any] | None:
    """Returns the first visible GPU's state now; None where nvidia-smi does not tell.

    Returns:
        `name`, `driver`, the clocks in MHz, `temperature_c`, `power_w`, `power_limit_w`, `utilization_percent`, and
        `reasons`, why the clock is what it is. Single values that are not told are None.
    """
    ask = ask or _nvidia_smi
    fields = ["name", "driver_version", *_FIELDS]
    for reasons in _REASONS:
        text = ask(
            ["nvidia-smi", *_which(), f"--query-gpu={','.join([*fields, reasons])}", "--format=csv,noheader,nounits"]
        )
        values = [value.strip() for value in (text or "").strip().partition("\n")[0].split(",")]
        if len(values) == len(fields) + 1:
            numbers = {ours: _number(value) for ours, value in zip(_FIELDS.values(), values[2:-1], strict=True)}
            return {"name": values[0], "driver": values[1], **numbers, "reasons": reasons_of(values[-1])}
    return None


def reasons_of(mask: str) -> list[str] | None:
    """Turns nvidia-smi's hexadecimal mask into words; None for what is no mask."""
    try:
        bits = int(mask, 16)
    except ValueError:
        return None
    return [word for bit, word in _BITS.items() if bits & bit]


def _which() -> list[str]:
    """The first GPU that CUDA shows; nvidia-smi itself takes no notice of CUDA_VISIBLE_DEVICES."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()
    return [f"--id={first or 0}"]


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:  # [N/A], [Not Supported]
        return None


def _nvidia_smi(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
