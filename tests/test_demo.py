import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT


@pytest.mark.slow
def test_the_demo_runs_all_stages_and_can_be_repeated(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/demo.py", "--arch", "resnet10t", "--epochs", "1", "--out", str(tmp_path)]
    for attempt in range(2):  # the second run reuses the training
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        table = run.stdout.split("held-out images")[1]
        accuracies = [float(number) for number in re.findall(r"([\d.]+)%", table)]
        assert len(accuracies) == 3, run.stdout
        assert min(accuracies) >= 90, run.stdout  # ten classes: 10% by chance
        assert max(accuracies) - min(accuracies) <= 0.3
        assert ("epoch 1/1" in run.stdout) == (attempt == 0)
    assert (tmp_path / "model.fp16.engine").exists()
