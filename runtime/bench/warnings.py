"""What a reader of the numbers should know: drift, noise, throttling, other work on the machine."""

from __future__ import annotations

from typing import Any

from runtime.bench.gpu import SLOWED_DOWN
from runtime.bench.statistics import drift

__all__ = ["warnings_of"]

_DRIFT = 0.05
_COV_PERCENT = 2.5
"""Above it trtexec calls the times unstable (of TensorRT 11; 1 % of TensorRT 8)."""
_OTHERS = 0.1
_ENQUEUE = 0.8
"""trtexec's: above this share of the compute time the host is what is slow."""


def warnings_of(result: dict[str, Any], gpu_unknown: bool) -> list[str]:
    """Returns a sentence each.

    Args:
        result: `advprop.benchrun/1`.
        gpu_unknown: whether a GPU was used whose state could not be read.
    """
    return [*_machine(result["machine"], gpu_unknown), *_points(result["points"])]


def _machine(machine: dict[str, Any], gpu_unknown: bool) -> list[str]:
    found = []
    share = machine["others_share"]
    if share is not None and share > _OTHERS:
        found.append(
            f"other work used {share:.0%} of the cores meanwhile: compare the ratios, and repeat on a quiet machine "
            "for times"
        )
    before, after = machine["before"], machine["after"]
    if before["throttled_periods"] is not None and (after["throttled_periods"] or 0) > before["throttled_periods"]:
        count = after["throttled_periods"] - before["throttled_periods"]
        found.append(
            f"the container's CPU quota stopped the processes {count} times: give it more, or use fewer threads"
        )
    clocks = [state["frequency_mhz"] for state in (before, after)]
    if before["frequency_source"] == "cpufreq" and None not in clocks and abs(clocks[1] / clocks[0] - 1) > _DRIFT:
        found.append(f"the CPU's clock was {clocks[0]:.0f} MHz before and {clocks[1]:.0f} MHz after")
    reasons = {reason for state in machine["gpu_states"] for reason in state["reasons"] or ()} & SLOWED_DOWN
    if reasons:
        found.append(f"the GPU was slowed down: {', '.join(sorted(reasons))}. nvidia-smi -lgc locks its clock")
    others = sorted({state["name"] for state in machine["gpu_states"]} - {machine["gpu"]})
    if others:
        found.append(f"nvidia-smi told of {', '.join(others)}; {machine['gpu']} was used, and its clocks are unknown")
    if gpu_unknown:
        found.append("clocks and throttling of the GPU are unknown: nvidia-smi did not tell")
    return found


def _points(points: list[dict[str, Any]]) -> list[str]:
    found, noisy = [], 0
    for point in points:
        where = f"{point['model']}, batch {point['batch_size']}, {point['concurrency']} at a time"
        quantities = point["quantities"]
        moved = drift(quantities["end_to_end"]["round_medians_ms"])
        if moved is not None and abs(moved) > _DRIFT:
            found.append(
                f"{where}: the last third of the rounds was {abs(moved):.0%} {'slower' if moved > 0 else 'quicker'}"
            )
        noisy += quantities["end_to_end"]["cov_percent"] > _COV_PERCENT
        if "enqueue" in quantities and quantities["enqueue"]["p50_ms"] > _ENQUEUE * quantities["compute"]["p50_ms"]:
            found.append(f"{where}: launching takes as long as computing; larger batches or CUDA graphs help")
    if noisy:
        found.append(
            f"times vary by more than {_COV_PERCENT} % (CoV) at {noisy} of {len(points)} points, more than trtexec "
            "thinks stable"
        )
    return found
