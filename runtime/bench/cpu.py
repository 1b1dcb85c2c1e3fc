"""The CPU before and after a run: clock, load, quota, and what else ran meanwhile. What cannot be read is None."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Usage", "cpu_name", "cpu_state", "others_share", "usage"]

_ROOT = Path("/")


def cpu_name(root: Path = _ROOT) -> str | None:
    """Returns the CPU's name, as /proc/cpuinfo has it."""
    return next((value for key, value in _cpuinfo(root) if key == "model name"), None)


def cpu_state(root: Path = _ROOT) -> dict[str, Any]:
    """Returns the CPU's state now.

    Returns:
        `frequency_mhz`, the mean of all cores, and `frequency_source`: `cpufreq`, or `cpuinfo`, which in virtual
        machines is the nominal one; `governor`; `load_average`, one minute; `quota_cores` of the control group, and
        its `throttled_periods` so far.
    """
    own = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    clocks = [value / 1000 for value in map(_number, own) if value]
    source = "cpufreq" if clocks else "cpuinfo"
    clocks = clocks or [float(value) for key, value in _cpuinfo(root) if key == "cpu MHz"]
    load = _text(root / "proc/loadavg")
    return {
        "frequency_mhz": round(statistics.fmean(clocks), 1) if clocks else None,
        "frequency_source": source if clocks else None,
        "governor": _text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "load_average": float(load.split()[0]) if load else None,
        "quota_cores": _quota(root),
        "throttled_periods": _throttled(root),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """CPU time up to a moment."""

    wall_s: float
    own_s: float
    """Of this process."""
    busy_s: float | None
    """Of all cores and processes; None where it cannot be read."""
    cores: int
    """Of the machine."""


def usage(root: Path = _ROOT) -> Usage:
    """Reads what the machine and this process have computed so far."""
    lines = [line.split() for line in (_text(root / "proc/stat") or "").splitlines() if line.startswith("cpu")]
    busy = None
    if lines and len(lines[0]) > 7:
        ticks = [int(word) for word in lines[0][1:]]  # user nice system idle iowait irq softirq steal …
        hertz = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
        busy = (sum(ticks[:3]) + sum(ticks[5:8])) / hertz
    own = os.times()
    return Usage(wall_s=time.monotonic(), own_s=own.user + own.system, busy_s=busy, cores=max(len(lines) - 1, 1))


def others_share(before: Usage, after: Usage) -> float | None:
    """Returns the share of the machine's cores that others used between two moments, 0 to 1; None if unknown."""
    if before.busy_s is None or after.busy_s is None or after.wall_s <= before.wall_s:
        return None
    if after.busy_s <= before.busy_s and after.own_s - before.own_s > 1:
        return None  # a sandbox that counts nothing
    others = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return min(max(others / ((after.wall_s - before.wall_s) * after.cores), 0.0), 1.0)


def _cpuinfo(root: Path) -> list[tuple[str, str]]:
    pairs = (line.partition(":") for line in (_text(root / "proc/cpuinfo") or "").splitlines())
    return [(key.strip(), value.strip()) for key, _, value in pairs]


def _quota(root: Path) -> float | None:
    """Cores that the control group grants (cgroup 2, else 1); None without a limit."""
    words = (_text(root / "sys/fs/cgroup/cpu.max") or "").split()
    if len(words) == 2 and words[0] != "max":
        return int(words[0]) / int(words[1])
    quota = _number(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    period = _number(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us")
    return quota / period if quota and period and quota > 0 else None


def _throttled(root: Path) -> int | None:
    for place in ("sys/fs/cgroup/cpu.stat", "sys/fs/cgroup/cpu/cpu.stat"):
        for line in (_text(root / place) or "").splitlines():
            if line.startswith("nr_throttled "):
                return int(line.split()[1])
    return None


def _number(path: Path) -> float | None:
    text = _text(path)
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
