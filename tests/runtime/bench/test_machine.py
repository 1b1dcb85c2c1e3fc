"""What is read from the machine, and the warnings about it."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from runtime.bench.machine import (
    SLOWED_DOWN,
    ClockReason,
    Usage,
    cpu_name,
    cpu_state,
    gpu_state,
    others_share,
    usage,
)
from runtime.bench.warnings import warnings_of

NOTHING = {
    "frequency_mhz": None,
    "frequency_source": None,
    "governor": None,
    "load_average": None,
    "quota_cores": None,
    "throttled_periods": None,
}


def tree(root: Path, files: dict[str, str]) -> Path:
    """Write files of /proc and /sys below another root."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_values_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    state = cpu_state(tmp_path)
    assert state.keys() == NOTHING.keys()
    assert (state["governor"], state["quota_cores"], state["throttled_periods"]) == (None, None, None)
    assert cpu_name(tmp_path) is None


def test_the_state_of_this_machine_is_read() -> None:
    state = cpu_state()
    assert state["load_average"] >= 0
    assert state["frequency_mhz"] is None or 100 < state["frequency_mhz"] < 10_000
    assert (state["frequency_mhz"] is None) == (state["frequency_source"] is None)


def test_control_groups_of_version_2(tmp_path: Path) -> None:
    files = {
        "proc/cpuinfo": "model name\t: A CPU @ 2 GHz\ncpu MHz\t\t: 2000.000\n\nmodel name\t: A CPU\ncpu MHz\t: 3000\n",
        "sys/fs/cgroup/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/cpu.stat": "usage_usec 5\nnr_periods 9\nnr_throttled 3\n",
    }
    state = cpu_state(tree(tmp_path, files))
    assert (state["quota_cores"], state["throttled_periods"], state["governor"]) == (1.5, 3, None)
    assert state["frequency_source"] in ("cpuinfo", None)
    assert cpu_name(tmp_path) == "A CPU @ 2 GHz"


def test_control_groups_of_version_1_and_the_governor(tmp_path: Path) -> None:
    files = {
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
        "sys/fs/cgroup/cpu.max": "max 100000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu/cpu.stat": "nr_periods 0\nnr_throttled 0\n",
    }
    state = cpu_state(tree(tmp_path, files))
    assert state["governor"] == "powersave"
    assert state["frequency_source"] in ("cpufreq", None)
    assert (state["quota_cores"], state["throttled_periods"]) == (None, 0)
    (tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_quota_us").write_text("250000\n")
    assert cpu_state(tmp_path)["quota_cores"] == 2.5


def test_usage_counts_the_work_of_this_process() -> None:
    before = usage()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    after = usage()
    assert after.cores >= 1
    assert 0.25 < after.own_s - before.own_s < 5
    assert after.wall_s - before.wall_s >= 0.29
    if before.busy_s is not None and after.busy_s is not None and after.busy_s > before.busy_s:
        assert after.busy_s - before.busy_s >= 0.2


def test_the_share_of_other_processes() -> None:
    def at(wall: float, own: float, busy: float | None) -> Usage:
        return Usage(wall_s=wall, own_s=own, busy_s=busy, cores=2)

    assert others_share(at(0, 1, 10), at(10, 9, 23)) == pytest.approx(0.25)
    assert others_share(at(0, 1, 10), at(10, 9, 17)) == 0
    assert others_share(at(0, 1, 0), at(10, 9, 0)) is None  # the counters stand still
    assert others_share(at(0, 1, None), at(10, 9, 3)) is None
    assert others_share(at(3, 1, 0), at(3, 1, 0)) is None


class StandInNvml:
    """A driver with two GPUs, with the constants and errors of pynvml."""

    NVMLError = pynvml.NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM = pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU
    UUIDS = ("GPU-aaaa-1111", "GPU-bbbb-2222")

    def __init__(self, *unsupported: str, old_driver: bool = False) -> None:
        self.open = 0
        self.unsupported = set(unsupported)
        if old_driver:
            self.unsupported.add("nvmlDeviceGetCurrentClocksEventReasons")
        self.reasons = pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonSwThermalSlowdown
        self.values = {
            "nvmlDeviceGetName": lambda gpu: f"NVIDIA {gpu}",
            "nvmlSystemGetDriverVersion": lambda: "550.54",
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetUUID": lambda gpu: self.UUIDS[gpu],
            "nvmlDeviceGetClockInfo": lambda gpu, kind: {self.NVML_CLOCK_SM: 1200, self.NVML_CLOCK_MEM: 6251}[kind],
            "nvmlDeviceGetMaxClockInfo": lambda gpu, kind: {self.NVML_CLOCK_SM: 2040}[kind],
            "nvmlDeviceGetTemperature": lambda gpu, sensor: 61,
            "nvmlDeviceGetPowerUsage": lambda gpu: 71_500,
            "nvmlDeviceGetPowerManagementLimit": lambda gpu: 72_000,
            "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=98, memory=10),
            "nvmlDeviceGetCurrentClocksEventReasons": lambda gpu: self.reasons,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda gpu: self.reasons,
        }

    def nvmlInit(self) -> None:  # noqa: N802
        if "nvmlInit" in self.unsupported:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if not 0 <= index < 2:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def __getattr__(self, name: str) -> Any:
        if name in self.unsupported:

            def unsupported(*arguments: Any) -> None:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

            return unsupported
        assert hasattr(pynvml, name), f"pynvml has no {name}"
        return self.values[name]


@pytest.mark.parametrize("old_driver", [False, True])
def test_the_state_of_a_gpu(old_driver: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = StandInNvml("nvmlDeviceGetPowerManagementLimit", old_driver=old_driver)
    assert gpu_state(nvml) == {
        "name": "NVIDIA 0",
        "driver": "550.54",
        "sm_mhz": 1200,
        "most_sm_mhz": 2040,
        "memory_mhz": 6251,
        "temperature_c": 61,
        "power_w": 71.5,
        "power_limit_w": None,
        "utilization_percent": 98,
        "reasons": ["power cap", "thermal slowdown (software)"],
    }
    assert nvml.open == 0


@pytest.mark.parametrize(
    ("visible", "name"),
    [("", "NVIDIA 0"), ("1,0", "NVIDIA 1"), ("GPU-bbbb", "NVIDIA 1"), ("GPU-cccc", None), ("7", None), ("-1", None)],
)
def test_the_first_gpu_that_cuda_shows_is_read(visible: str, name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    state = gpu_state(StandInNvml())
    assert (state and state["name"]) == name


def test_without_a_driver_the_state_is_unknown() -> None:
    assert gpu_state(StandInNvml("nvmlInit")) is None
    no_reasons = StandInNvml("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
    state = gpu_state(no_reasons)
    assert state is not None
    assert state["reasons"] is None


def test_clock_reasons_equal_nvmls() -> None:
    assert {reason.name: reason.value for reason in ClockReason} == {
        "IDLE": pynvml.nvmlClocksEventReasonGpuIdle,
        "APPLICATION_CLOCKS": pynvml.nvmlClocksEventReasonApplicationsClocksSetting,
        "POWER_CAP": pynvml.nvmlClocksEventReasonSwPowerCap,
        "HARDWARE_SLOWDOWN": pynvml.nvmlClocksEventReasonHwSlowdown,
        "SYNC_BOOST": pynvml.nvmlClocksEventReasonSyncBoost,
        "SOFTWARE_THERMAL_SLOWDOWN": pynvml.nvmlClocksEventReasonSwThermalSlowdown,
        "HARDWARE_THERMAL_SLOWDOWN": pynvml.nvmlClocksEventReasonHwThermalSlowdown,
        "POWER_BRAKE": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
        "DISPLAY_CLOCKS": pynvml.nvmlClocksEventReasonDisplayClockSetting,
    }
    nvml = StandInNvml()
    nvml.reasons = pynvml.nvmlClocksEventReasonAll
    state = gpu_state(nvml)
    assert state is not None
    assert state["reasons"] == [reason.text for reason in ClockReason]
    assert {
        *("power cap", "hardware slowdown", "power brake"),
        *("thermal slowdown (software)", "thermal slowdown (hardware)"),
    } == SLOWED_DOWN


L4 = {"name": "NVIDIA L4"}


def result(**changes: Any) -> dict[str, Any]:
    """Return a result with a single point, without anything to warn about."""
    machine = {
        "gpu": "NVIDIA L4",
        "others_share": 0.0,
        "before": NOTHING,
        "after": NOTHING,
        "gpu_states": [],
    } | changes.pop("machine", {})
    end_to_end = {"round_medians_ms": [1.0] * 6, "cov_percent": 1.0, "p50_ms": 1.0} | changes.pop("end_to_end", {})
    point = {"model": "m", "batch_size": 8, "concurrency": 1, "quantities": {"end_to_end": end_to_end, **changes}}
    return {"machine": machine, "points": [point]}


def test_warnings_about_the_machine() -> None:
    assert warnings_of(result(), gpu_unknown=False) == []
    cases: list[tuple[dict[str, Any], str]] = [
        ({"machine": {"others_share": 0.3}}, "other processes used 30% of the cores"),
        (
            {"machine": {"before": NOTHING | {"throttled_periods": 1}, "after": NOTHING | {"throttled_periods": 5}}},
            "CPU quota paused its processes 4 times",
        ),
        (
            {
                "machine": {
                    "before": NOTHING | {"frequency_mhz": 3000.0, "frequency_source": "cpufreq"},
                    "after": NOTHING | {"frequency_mhz": 2000.0, "frequency_source": "cpufreq"},
                }
            },
            "the CPU clock changed from 3000 MHz to 2000 MHz",
        ),
        (
            {"machine": {"gpu_states": [L4 | {"reasons": ["idle", "power cap"]}, L4 | {"reasons": None}]}},
            "slowed down: power cap. Lock its clock with nvidia-smi -lgc",
        ),
        (
            {"machine": {"gpu": "NVIDIA T4", "gpu_states": [L4 | {"reasons": []}]}},
            "NVML reports NVIDIA L4, but the run used NVIDIA T4",
        ),
        (
            {"end_to_end": {"round_medians_ms": [1, 1, 1.02, 1.05, 1.1, 1.1]}},
            "the last third of the rounds was 10% slower than the first",
        ),
        ({"end_to_end": {"cov_percent": 3.0}}, "more than 2.5% (CoV) at 1 of 1 points"),
        ({"enqueue": {"p50_ms": 0.9}, "compute": {"p50_ms": 1.0}}, "enqueuing takes as long as computing"),
    ]
    for changes, message in cases:
        (found,) = warnings_of(result(**changes), gpu_unknown=False)
        assert message in found
    assert warnings_of(result(), gpu_unknown=True) == [
        "clocks and throttling of the GPU are unknown, because NVML could not read them"
    ]
