import os
from pathlib import Path

import pytest

from runtime.system.cpu import has_exact_int8, parse_exact_int8, usable_cores


@pytest.mark.parametrize(
    ("cpuinfo", "exact"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\n", True),
        ("processor : 0\nflags\t\t: fpu avx2 avx_vnni\n", True),
        ("processor : 0\nflags\t\t: fpu avx2 avx512f\nbugs : avx_vnni\n", False),
        ("Features\t: fp asimd asimddp\n", True),
        ("Features\t: fp asimd\n", False),
        ("", None),
    ],
)
def test_exact_int8_follows_from_the_cpu_flags(cpuinfo: str, exact: bool | None) -> None:
    assert parse_exact_int8(cpuinfo) is exact


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="this system has no /proc/cpuinfo")
def test_this_cpu_is_read_from_proc() -> None:
    assert has_exact_int8() is parse_exact_int8(Path("/proc/cpuinfo").read_text())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_usable_cores_respects_the_affinity() -> None:
    before = os.sched_getaffinity(0)
    assert usable_cores() == len(before)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
