"""Damaged and hostile files: whatever reads them raises only advprop's own errors.

`python -m benchmarks.fuzz --minutes 10` runs a hundred thousand cases, and limits time and memory.
"""

from pathlib import Path

import pytest

from tests.support.fuzzing import KINDS, run_case


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_only_our_own_errors_are_raised(kind: str, tmp_path: Path) -> None:
    cases = 25 * KINDS[kind].share
    results = {run_case(kind, seed, tmp_path) for seed in range(cases)}
    assert results > {"passed"} or kind in ("sidecars", "plans", "arrays", "options", "progress logs")
    assert results
