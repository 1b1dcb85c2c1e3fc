import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from train.distributed import shuffled_across_processes, synchronise_batch_norms, world_size
from train.dual_bn import add_auxiliary_bns

ROOT = Path(__file__).parent.parent.parent
WORKER = Path(__file__).parent / "distributed_worker.py"


def losses(out: Path, recipe: str, processes: int) -> list[float]:
    out.mkdir()
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launch, str(WORKER), recipe, "40", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads((out / "losses.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo over the loopback interface, as POSIX names it")
@pytest.mark.parametrize("recipe", ["advprop", "fast"])
def test_two_processes_train_as_one_with_the_doubled_batch(tmp_path: Path, recipe: str) -> None:
    one = losses(tmp_path / "one", recipe, 1)
    two = losses(tmp_path / "two", recipe, 2)
    assert len(one) == len(two) == 20
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1e-4
    assert one[-1] != one[0]


def test_synchronised_batch_norm_is_the_ordinary_one_in_a_single_process() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("efficientnet_b0", num_classes=3).train()
    synchronised = synchronise_batch_norms(timm.create_model("efficientnet_b0", num_classes=3)).train()
    synchronised.load_state_dict(plain.state_dict())
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(plain.eval()(images), add_auxiliary_bns(synchronised, ["adv"]).eval()(images))


def test_nothing_is_shuffled_in_a_single_process() -> None:
    images, labels = torch.rand(3, 2), torch.arange(3)
    assert world_size() == 1
    assert shuffled_across_processes(images, labels)[0] is images
