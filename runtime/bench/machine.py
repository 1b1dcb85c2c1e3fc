"""The machine before, during and after a run: clocks, load, quota, other processes, and the GPU.

psutil and NVML report most of it. The control group's quota, the CPU's name and its governor are
read from the file system. Values that cannot be read are None.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from typing import Any

__all__ = [
    "SLOWED_DOWN",
    "ClockReason",
    "Usage",
    "cpu_name",
    "cpu_state",
    "gpu_state",
    "others_share",
    "usage",
]

_ROOT = Path("/")
_CPUFREQ = ("sys/devices/system/cpu/cpufreq", "sys/devices/system/cpu/cpu0/cpufreq")
_BUSY = ("user", "nice", "system", "irq", "softirq", "steal", "interrupt", "dpc")
"""Fields of `psutil.cpu_times` that are not idle time, on all platforms."""


class ClockReason(IntFlag):
    """Reasons for the current clock of a GPU, as in NVML's `nvmlClocksEventReasons`."""

    IDLE = 0x1
    APPLICATION_CLOCKS = 0x2
    POWER_CAP = 0x4
    HARDWARE_SLOWDOWN = 0x8
    SYNC_BOOST = 0x10
    SOFTWARE_THERMAL_SLOWDOWN = 0x20
    HARDWARE_THERMAL_SLOWDOWN = 0x40
    POWER_BRAKE = 0x80
    DISPLAY_CLOCKS = 0x100

    @property
    def text(self) -> str:
        """The reason as results record it."""
        return _REASON_TEXTS.get(self, str(self.name).lower().replace("_", " "))


_REASON_TEXTS = {
    ClockReason.SOFTWARE_THERMAL_SLOWDOWN: "thermal slowdown (software)",
    ClockReason.HARDWARE_THERMAL_SLOWDOWN: "thermal slowdown (hardware)",
}

SLOWED_DOWN = frozenset(
    reason.text
    for reason in (
        ClockReason.POWER_CAP,
        ClockReason.HARDWARE_SLOWDOWN,
        ClockReason.SOFTWARE_THERMAL_SLOWDOWN,
        ClockReason.HARDWARE_THERMAL_SLOWDOWN,
        ClockReason.POWER_BRAKE,
    )
)
"""Reasons why a GPU runs slower than it could, as results record them."""


def cpu_name(root: Path = _ROOT) -> str | None:
    """Return the CPU's name as in /proc/cpuinfo."""
    pairs = (line.partition(":") for line in (_read(root / "proc/cpuinfo") or "").splitlines())
    return next((value.strip() for key, _, value in pairs if key.strip() == "model name"), None)


def cpu_state(root: Path = _ROOT) -> dict[str, Any]:
    """Return the current state of the CPU.

    Args:
        root: root of the file system that quota and governor are read from.

    Returns:
        `frequency_mhz`, the mean of all cores; `frequency_source`, which is `cpufreq`, or `cpuinfo`
        if the frequency may only be nominal, as in virtual machines; `governor`; `load_average`
        over one minute; `quota_cores` of the control group, None without a limit; and its number of
        `throttled_periods`.
    """
    import psutil

    try:
        frequency = psutil.cpu_freq()
    except (AttributeError, NotImplementedError, OSError, RuntimeError):  # not on every platform
        frequency = None
    source = "cpufreq" if any((root / folder).is_dir() for folder in _CPUFREQ) else "cpuinfo"
    return {
        "frequency_mhz": round(frequency.current, 1) if frequency else None,
        "frequency_source": source if frequency else None,
        "governor": _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "load_average": round(psutil.getloadavg()[0], 2),
        "quota_cores": _quota(root),
        "throttled_periods": _throttled(root),
    }


def _quota(root: Path) -> float | None:
    """Return the cores that the control group (version 2 or 1) grants; None without a limit."""
    words = (_read(root / "sys/fs/cgroup/cpu.max") or "").split()
    if len(words) == 2 and words[0] != "max":
        return int(words[0]) / int(words[1])
    quota = _read(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    period = _read(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us")
    return int(quota) / int(period) if quota and period and int(quota) > 0 else None


def _throttled(root: Path) -> int | None:
    for path in ("sys/fs/cgroup/cpu.stat", "sys/fs/cgroup/cpu/cpu.stat"):
        for line in (_read(root / path) or "").splitlines():
            if line.startswith("nr_throttled "):
                return int(line.split()[1])
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """CPU time since the start, in seconds."""

    wall_s: float
    own_s: float
    """CPU time of this process."""
    busy_s: float | None
    """CPU time of all processes on all cores; None if it cannot be read."""
    cores: int
    """Cores of the machine."""


def usage() -> Usage:
    """Return the CPU time that this process and all processes have used so far."""
    import psutil

    own = os.times()
    try:
        times = psutil.cpu_times()
    except OSError:
        busy = None
    else:
        busy = sum(getattr(times, field, 0.0) for field in _BUSY)
    cores = psutil.cpu_count() or 1
    return Usage(wall_s=time.monotonic(), own_s=own.user + own.system, busy_s=busy, cores=cores)


def others_share(before: Usage, after: Usage) -> float | None:
    """Return the share of the machine's cores that other processes used; None if unknown."""
    if before.busy_s is None or after.busy_s is None or after.wall_s <= before.wall_s:
        return None
    if after.busy_s <= before.busy_s and after.own_s - before.own_s > 1:
        return None  # a sandbox in which the counters stand still
    others = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return min(max(others / ((after.wall_s - before.wall_s) * after.cores), 0.0), 1.0)


def gpu_state(nvml: Any = None) -> dict[str, Any] | None:
    """Return the current state of the first visible GPU; None if NVML cannot read it.

    Args:
        nvml: a module with the functions of `pynvml` (default: `pynvml`).

    Returns:
        `name`, `driver`, clocks in MHz (`sm_mhz`, `most_sm_mhz`, `memory_mhz`), `temperature_c`,
        `power_w`, `power_limit_w`, `utilization_percent`, and `reasons` for the current clock.
        Values that the GPU does not report are None.
    """
    if nvml is None:
        try:
            import pynvml
        except ImportError:
            return None
        nvml = pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # no driver
        return None
    try:
        device = _first_visible_gpu(nvml)
        name, driver = nvml.nvmlDeviceGetName(device), nvml.nvmlSystemGetDriverVersion()
    except nvml.NVMLError:
        return None
    else:
        return {"name": name, "driver": driver, **_gpu_values(nvml, device)}
    finally:
        nvml.nvmlShutdown()


def _gpu_values(nvml: Any, device: Any) -> dict[str, Any]:
    def value(read: Callable[..., Any], *arguments: Any, scale: float = 1.0) -> float | None:
        try:
            return float(read(device, *arguments)) * scale
        except nvml.NVMLError:  # many GPUs do not report all values
            return None

    def reasons() -> list[str] | None:
        # The second function has the name that drivers before 535 know.
        for read in (nvml.nvmlDeviceGetCurrentClocksEventReasons, nvml.nvmlDeviceGetCurrentClocksThrottleReasons):
            mask = value(read)
            if mask is not None:
                return [reason.text for reason in ClockReason if reason & int(mask)]
        return None

    return {
        "sm_mhz": value(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        "most_sm_mhz": value(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
        "memory_mhz": value(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
        "temperature_c": value(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        "power_w": value(nvml.nvmlDeviceGetPowerUsage, scale=1e-3),
        "power_limit_w": value(nvml.nvmlDeviceGetPowerManagementLimit, scale=1e-3),
        "utilization_percent": value(lambda gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu),
        "reasons": reasons(),
    }


def _first_visible_gpu(nvml: Any) -> Any:
    """Return the first GPU that CUDA shows. NVML itself ignores CUDA_VISIBLE_DEVICES."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip() or "0"
    if first.lstrip("-").isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(first))
    devices = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
    matching = (device for device in devices if nvml.nvmlDeviceGetUUID(device).startswith(first))  # may be abbreviated
    return next(matching, None) or nvml.nvmlDeviceGetHandleByUUID(first)
