"""Warnings about a run: drift, noise, throttling, and other processes on the machine."""

from __future__ import annotations

from typing import Any

from runtime.bench.machine import SLOWED_DOWN
from runtime.bench.statistics import drift

__all__ = ["warnings_of"]

_MAX_DRIFT = 0.05
_MAX_COV_PERCENT = 2.5
"""Coefficient of variation above which trtexec of TensorRT 11 reports unstable times; TensorRT 8
uses 1%."""
_MAX_OTHERS = 0.1
_MAX_ENQUEUE = 0.8
"""Share of the compute time above which trtexec reports the enqueue time as the bottleneck."""


def warnings_of(result: dict[str, Any], *, gpu_unknown: bool) -> list[str]:
    """Return the warnings about a run.

    Args:
        result: `advprop.benchrun/1`.
        gpu_unknown: whether the state of the used GPU could not be read.
    """
    return [*_machine_warnings(result["machine"], gpu_unknown), *_point_warnings(result["points"])]


def _machine_warnings(machine: dict[str, Any], gpu_unknown: bool) -> list[str]:
    found = []
    share = machine["others_share"]
    if share is not None and share > _MAX_OTHERS:
        found.append(
            f"other processes used {share:.0%} of the cores during the run: rely on ratios only, and repeat on an idle "
            "machine to measure times"
        )
    before, after = machine["before"], machine["after"]
    if before["throttled_periods"] is not None and (after["throttled_periods"] or 0) > before["throttled_periods"]:
        count = after["throttled_periods"] - before["throttled_periods"]
        found.append(
            f"the container's CPU quota paused its processes {count} times: raise the quota or use fewer threads"
        )
    clocks = [state["frequency_mhz"] for state in (before, after)]
    if before["frequency_source"] == "cpufreq" and None not in clocks and abs(clocks[1] / clocks[0] - 1) > _MAX_DRIFT:
        found.append(f"the CPU clock changed from {clocks[0]:.0f} MHz to {clocks[1]:.0f} MHz during the run")
    reasons = {reason for state in machine["gpu_states"] for reason in state["reasons"] or ()} & SLOWED_DOWN
    if reasons:
        found.append(f"the GPU was slowed down: {', '.join(sorted(reasons))}. Lock its clock with nvidia-smi -lgc")
    others = sorted({state["name"] for state in machine["gpu_states"]} - {machine["gpu"]})
    if others:
        found.append(
            f"NVML reports {', '.join(others)}, but the run used {machine['gpu']}, whose clocks are unknown: set "
            "CUDA_VISIBLE_DEVICES"
        )
    if gpu_unknown:
        found.append("clocks and throttling of the GPU are unknown, because NVML could not read them")
    return found


def _point_warnings(points: list[dict[str, Any]]) -> list[str]:
    found, noisy = [], 0
    for point in points:
        callers = point["concurrency"]
        where = f"{point['model']}, batch {point['batch_size']}, {callers} caller{'s' * (callers > 1)}"
        quantities = point["quantities"]
        moved = drift(quantities["end_to_end"]["round_medians_ms"])
        if moved is not None and abs(moved) > _MAX_DRIFT:
            change = "slower" if moved > 0 else "faster"
            found.append(f"{where}: the last third of the rounds was {abs(moved):.0%} {change} than the first")
        noisy += quantities["end_to_end"]["cov_percent"] > _MAX_COV_PERCENT
        if "enqueue" in quantities and quantities["enqueue"]["p50_ms"] > _MAX_ENQUEUE * quantities["compute"]["p50_ms"]:
            found.append(f"{where}: enqueuing takes as long as computing; use larger batches or CUDA graphs")
    if noisy:
        found.append(
            f"times vary by more than {_MAX_COV_PERCENT}% (CoV) at {noisy} of {len(points)} points, which trtexec "
            "considers unstable"
        )
    return found
