import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch

from tests.support import ROOT
from tests.support.distributed_worker import STEPS
from train.checkpoint import load_checkpoint
from train.distributed import shuffled_across_processes, synchronize_batch_norms, world_size
from train.dual_bn import add_auxiliary_bns

WORKER = ROOT / "tests" / "support" / "distributed_worker.py"


def run_worker(out: Path, what: str, processes: int) -> None:
    """Run the worker script in a number of processes."""
    out.mkdir()
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launch, str(WORKER), what, "20", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr


def losses(out: Path, recipe: str, processes: int) -> list[float]:
    run_worker(out, recipe, processes)
    return json.loads((out / "losses.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo uses the POSIX name of the loopback interface")
@pytest.mark.parametrize("recipe", ["advprop", "shared-statistics", "fast"])
def test_two_processes_train_like_one_with_twice_the_batch_size(tmp_path: Path, recipe: str) -> None:
    one = losses(tmp_path / "one", recipe, 1)
    two = losses(tmp_path / "two", recipe, 2)
    assert len(one) == len(two) == STEPS[recipe]
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1e-4
    assert one[-1] != one[0]


def test_synchronized_batch_norm_in_a_single_process() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("efficientnet_b0", num_classes=3).train()
    synchronized = synchronize_batch_norms(timm.create_model("efficientnet_b0", num_classes=3)).train()
    synchronized.load_state_dict(plain.state_dict())
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(plain.eval()(images), add_auxiliary_bns(synchronized, ["adv"]).eval()(images))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo uses the POSIX name of the loopback interface")
def test_images_are_shuffled_across_processes_with_their_labels(tmp_path: Path) -> None:
    run_worker(tmp_path / "two", "shuffle", 2)
    results = [json.loads((tmp_path / "two" / f"{rank}.json").read_text()) for rank in range(2)]
    for rank, (images, labels) in enumerate(results):
        assert images == labels
        received = sum(label // 64 != rank for label in labels)
        assert 16 <= received <= 48  # expected: 32 ± 4
    assert sorted(results[0][1] + results[1][1]) == list(range(128))


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="finds the processes of torchrun in /proc, which only Linux has"
)
def test_a_run_resumes_after_torchrun_restarts_a_killed_process(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    settings = ["--arch", "resnet10t", "--img-size", "16", "--epochs", "2", "--batch-size", "64", "--workers", "0"]
    settings += ["--out", str(tmp_path), "--resume", "auto", "--set", "save_every=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "COLUMNS": "300"}
    command = [*launch, "-m", "train.run", *settings]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        deadline = time.monotonic() + 120
        while not (tmp_path / "last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        output, _ = run.communicate(timeout=180)
    assert run.returncode == 0, output
    assert re.search(r"resuming \S*last\.pt at epoch \d, step \d+", " ".join(output.split())), output
    checkpoint = load_checkpoint(tmp_path / "last.pt")
    assert (checkpoint["epoch"], checkpoint["step"]) == (2, 22)


def test_a_single_process_does_not_shuffle() -> None:
    images, labels = torch.rand(3, 2), torch.arange(3)
    assert world_size() == 1
    assert shuffled_across_processes(images, labels)[0] is images
