"""No request is lost and nothing hangs if any call of the batching code fails."""

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from PIL import Image

from tests.support import ROOT
from tests.support.serving_models import FRAGILE, serving_model


@pytest.mark.slow
def test_every_call_of_the_batching_code_may_fail(tmp_path: Path) -> None:
    onnx.save(serving_model(FRAGILE), tmp_path / "model.onnx")
    Image.new("RGB", (4, 4)).save(tmp_path / "image.png")
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.batching_faults", tmp_path / "model.onnx", tmp_path / "image.png"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["problems"] == []
    assert found["places"] > 150
    assert found["faults"] > 600
    assert found["slowest_close_s"] < 5  # a limit that must hold, not a measured speed
