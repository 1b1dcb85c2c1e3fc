"""Damaged and hostile files: whatever reads them raises only advprop's own errors.

`ADVPROP_FUZZ=2000 pytest tests/runtime/test_fuzz.py` runs more cases, and different ones every
time; `benchmarks/fuzz.py` counts their results.
"""

import os
from pathlib import Path

import pytest

from tests.support.fuzzing import KINDS, fuzz

CASES = int(os.environ.get("ADVPROP_FUZZ", "0"))


@pytest.mark.parametrize("kind", KINDS)
def test_only_our_own_errors_are_raised(kind: str, tmp_path: Path) -> None:
    counts = fuzz(kind, CASES or 120, tmp_path, seeded=not CASES)
    assert counts.total() >= 100
    if kind.startswith("ONNX"):
        assert counts["passed"]  # some cases are valid files
