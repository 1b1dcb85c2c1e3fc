"""What is read of the machine, and what is said of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from runtime.bench.cpu import Usage, cpu_name, cpu_state, others_share, usage
from runtime.bench.gpu import gpu_state, reasons_of
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
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_an_unknown_machine(tmp_path: Path) -> None:
    assert cpu_state(tmp_path) == NOTHING
    assert cpu_name(tmp_path) is None
    assert usage(tmp_path).busy_s is None
    assert others_share(usage(tmp_path), usage(tmp_path)) is None


def test_a_virtual_machine(tmp_path: Path) -> None:
    files = {
        "proc/cpuinfo": "model name\t: A CPU @ 2 GHz\ncpu MHz\t\t: 2000.000\n\nmodel name\t: A CPU\ncpu MHz\t: 3000\n",
        "proc/loadavg": "1.50 0.82 2.04 1/86 4195\n",
        "sys/fs/cgroup/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/cpu.stat": "usage_usec 5\nnr_periods 9\nnr_throttled 3\n",
    }
    state = cpu_state(tree(tmp_path, files))
    assert state == {
        "frequency_mhz": 2500,
        "frequency_source": "cpuinfo",
        "governor": None,
        "load_average": 1.5,
        "quota_cores": 1.5,
        "throttled_periods": 3,
    }
    assert cpu_name(tmp_path) == "A CPU @ 2 GHz"


def test_clocks_by_cpufreq_and_the_older_control_groups(tmp_path: Path) -> None:
    files = {
        "proc/cpuinfo": "cpu MHz : 2000\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "800000\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
        "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "1200000\n",
        "sys/fs/cgroup/cpu.max": "max 100000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu/cpu.stat": "nr_periods 0\nnr_throttled 0\n",
    }
    state = cpu_state(tree(tmp_path, files))
    assert (state["frequency_mhz"], state["frequency_source"], state["governor"]) == (1000, "cpufreq", "powersave")
    assert (state["quota_cores"], state["throttled_periods"]) == (None, 0)


def test_what_others_computed(tmp_path: Path) -> None:
    stat = "cpu  100 0 50 900 10 0 5 45 7 0\ncpu0 50 0 25 450 5 0 3 22 0 0\ncpu1 50 0 25 450 5 0 2 23 0 0\nintr 5\n"
    found = usage(tree(tmp_path, {"proc/stat": stat}))
    assert found.cores == 2
    assert found.busy_s == pytest.approx(2.0)  # 200 ticks of user, nice, system, irq, softirq and steal

    def at(wall: float, own: float, busy: float | None) -> Usage:
        return Usage(wall_s=wall, own_s=own, busy_s=busy, cores=2)

    assert others_share(at(0, 1, 10), at(10, 9, 23)) == pytest.approx(0.25)
    assert others_share(at(0, 1, 10), at(10, 9, 17)) == 0
    assert others_share(at(0, 1, 0), at(10, 9, 0)) is None  # counts nothing
    assert others_share(at(0, 1, None), at(10, 9, 3)) is None


LINE = "NVIDIA L4, 550.54, 1200, 2040, 6251, 61, 71.5, [N/A], 98, 0x0000000000000024\n"


def test_a_gpu() -> None:
    asked: list[Sequence[str]] = []

    def ask(command: Sequence[str]) -> str | None:
        asked.append(command)
        return LINE if "clocks_throttle_reasons.active" in command[2] else None  # an older driver

    assert gpu_state(ask) == {
        "name": "NVIDIA L4",
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
    assert len(asked) == 2
    assert gpu_state(lambda _: None) is None
    assert gpu_state(lambda _: "Field is not valid\n") is None
    assert reasons_of("[N/A]") is None
    assert reasons_of("0x0") == []


L4 = {"name": "NVIDIA L4"}


def result(**changes: Any) -> dict[str, Any]:
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


def test_what_a_reader_is_told() -> None:
    assert warnings_of(result(), False) == []
    cases: list[tuple[dict[str, Any], str]] = [
        ({"machine": {"others_share": 0.3}}, "other work used 30% of the cores"),
        (
            {"machine": {"before": NOTHING | {"throttled_periods": 1}, "after": NOTHING | {"throttled_periods": 5}}},
            "CPU quota stopped the processes 4 times",
        ),
        (
            {
                "machine": {
                    "before": NOTHING | {"frequency_mhz": 3000.0, "frequency_source": "cpufreq"},
                    "after": NOTHING | {"frequency_mhz": 2000.0, "frequency_source": "cpufreq"},
                }
            },
            "3000 MHz before and 2000 MHz after",
        ),
        (
            {"machine": {"gpu_states": [L4 | {"reasons": ["idle", "power cap"]}, L4 | {"reasons": None}]}},
            "slowed down: power cap. nvidia-smi -lgc",
        ),
        (
            {"machine": {"gpu": "NVIDIA T4", "gpu_states": [L4 | {"reasons": []}]}},
            "nvidia-smi told of NVIDIA L4; NVIDIA T4 was used",
        ),
        (
            {"end_to_end": {"round_medians_ms": [1, 1, 1.02, 1.05, 1.1, 1.1]}},
            "the last third of the rounds was 10% slower",
        ),
        ({"end_to_end": {"cov_percent": 3.0}}, "more than 2.5 % (CoV) at 1 of 1 points"),
        ({"enqueue": {"p50_ms": 0.9}, "compute": {"p50_ms": 1.0}}, "launching takes as long as computing"),
    ]
    for changes, words in cases:
        (found,) = warnings_of(result(**changes), False)
        assert words in found
    assert warnings_of(result(), True) == ["clocks and throttling of the GPU are unknown: nvidia-smi did not tell"]
