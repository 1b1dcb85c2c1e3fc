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


def work(out: Path, what: str, processes: int) -> None:
    out.mkdir()
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launch, str(WORKER), what, "40", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr


def losses(out: Path, recipe: str, processes: int) -> list[float]:
    work(out, recipe, processes)
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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo over the loopback interface, as POSIX names it")
def test_adversarial_images_change_processes_with_their_labels(tmp_path: Path) -> None:
    work(tmp_path / "two", "shuffle", 2)
    results = [json.loads((tmp_path / "two" / f"{rank}.json").read_text()) for rank in range(2)]
    for rank, (images, labels) in enumerate(results):
        assert images == labels
        strangers = sum(label // 64 != rank for label in labels)
        assert 16 <= strangers <= 48  # 32 ± 4 by chance
    assert sorted(results[0][1] + results[1][1]) == list(range(128))


def test_nothing_is_shuffled_in_a_single_process() -> None:
    images, labels = torch.rand(3, 2), torch.arange(3)
    assert world_size() == 1
    assert shuffled_across_processes(images, labels)[0] is images
