"""Measure time and memory of a training step of each recipe, relative to vanilla and a reference.

    python -m benchmarks.train_step    two networks at 64 px, batch size 32: ten minutes
    python -m benchmarks.train_step --arch resnet18 --rounds 5

All rows of a network are timed in interleaved rounds, so changes of the machine's speed affect all
of them. A ratio compares times of the same round; its median, minimum and maximum over the rounds
are printed. The bound counts passes (forward = input gradient = weight gradient = 1): (2K + 6) / 3
for AdvProp with K attack steps, 1.2 for Fast AdvProp. `fast` splits its batch into four parts of
clean images and one of adversarial images. `fast 4:1` adds the published share of adversarial
images to a vanilla batch (64 to 256 clean ones), and its time is scaled to the same number of
images: the cost of an epoch.

"reference" is a direct implementation of Algorithm 1: a layer with two BatchNorms and a flag,
separate forward passes for clean and adversarial images, attack gradients by `backward` without
freezing the parameters, and the default memory format. The other rows run the step of `train.run`.
All rows include the optimizer step.

Peak memory is measured in a separate process for each row: the maximum resident size minus the
size before the first step.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

# oneDNN caches 1,024 prepared operations. One recipe needs about half of them; all rows in one
# process need more, and would prepare theirs again in each step.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")

import timm
import torch
import torch.nn.functional as F
from torch import nn

from train.attack import LinfPGD
from train.config import AttackConfig
from train.recipes import RECIPES
from train.task import AdvPropTask

MEAN = STD = (0.5, 0.5, 0.5)
CLASSES = 1000
Step = Callable[[torch.Tensor, torch.Tensor], None]
ROWS = ("vanilla", "advprop PGD-1", "reference PGD-1", "advprop PGD-5", "reference PGD-5", "fast", "fast 4:1")
BOUNDS = {"advprop PGD-1": 8 / 3, "advprop PGD-5": 16 / 3, "fast": 1.2, "fast 4:1": 1.2, "vanilla": 1.0}


class TwoBatchNorms(nn.Module):
    """BatchNorm of the reference: a flag of the class selects one of two layers."""

    adversarial = False

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.main, self.aux = layer, copy.deepcopy(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.aux(x) if TwoBatchNorms.adversarial else self.main(x)


def with_two_batch_norms(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        setattr(
            module, name, TwoBatchNorms(child) if isinstance(child, nn.BatchNorm2d) else with_two_batch_norms(child)
        )
    return module


def reference_step(arch: str, steps: int, device: str = "cpu", amp: torch.dtype | None = None) -> Step:
    model = with_two_batch_norms(timm.create_model(arch, num_classes=CLASSES)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    epsilon = (steps - 1 or 1) * 2 / 255

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        with torch.autocast(device, amp, enabled=amp is not None):
            losses(images, labels).backward()
        optimizer.step()

    def losses(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        TwoBatchNorms.adversarial = True
        model.eval()
        targets = (labels + torch.randint(1, CLASSES, labels.shape, device=device)) % CLASSES
        attacked = images + torch.empty_like(images).uniform_(-epsilon, epsilon)
        for _ in range(steps):
            attacked = attacked.detach().requires_grad_(True)
            F.cross_entropy(model(attacked), targets).backward()
            assert attacked.grad is not None
            attacked = attacked - attacked.grad.sign() * 2 / 255
            attacked = torch.clamp(torch.minimum(torch.maximum(attacked, images - epsilon), images + epsilon), -1, 1)
        attacked = attacked.detach()
        model.train()
        optimizer.zero_grad()
        TwoBatchNorms.adversarial = False
        loss = F.cross_entropy(model(images), labels)
        TwoBatchNorms.adversarial = True
        return loss + F.cross_entropy(model(attacked), labels)

    return step


def our_step(
    arch: str, recipe: str, steps: int, device: str = "cpu", amp: torch.dtype | None = None, compiled: bool = False
) -> Step:
    model = timm.create_model(arch, num_classes=CLASSES).to(device).to(memory_format=torch.channels_last)
    config = AttackConfig(epsilon=max(1, steps - 1), steps=steps, targeted=recipe != "fast")
    attack = LinfPGD(config, MEAN, STD)
    task = AdvPropTask(model, RECIPES[recipe], attack, amp_dtype=amp, device=torch.device(device)).train()
    if compiled:
        task.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        task(images, labels)["loss"].backward()
        optimizer.step()

    return step


def make_step(arch: str, row: str) -> Step:
    torch.manual_seed(0)
    name, _, kind = row.removesuffix(" 4:1").partition(" PGD-")
    if name == "reference":
        return reference_step(arch, int(kind))
    return our_step(arch, name, int(kind or 1))


def images_of(row: str, count: int) -> int:
    """Return the batch size of a row, given the batch size `count` of vanilla."""
    return count * 5 // 4 if row.endswith("4:1") else count


def batch(size: int, count: int, row: str) -> tuple[torch.Tensor, torch.Tensor]:
    count = images_of(row, count)
    images = torch.rand(count, 3, size, size) * 2 - 1
    if not row.startswith("reference"):
        images = images.to(memory_format=torch.channels_last)
    return images, torch.randint(0, CLASSES, (count,))


def memory_mb(field: str) -> float:
    """Return VmRSS (current) or VmHWM (maximum) of this process, in MB (Linux only)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) * 1024 / 1e6


def peak_mb(arch: str, row: str, size: int, count: int, queue: multiprocessing.Queue[float]) -> None:
    torch.set_num_threads(2)
    step = make_step(arch, row)
    images, labels = batch(size, count, row)
    before = memory_mb("VmRSS")
    for _ in range(2):
        step(images, labels)
    queue.put(memory_mb("VmHWM") - before)


def measure(arch: str, size: int, count: int, rounds: int) -> None:
    steps = {row: make_step(arch, row) for row in ROWS}
    batches = {row: batch(size, count, row) for row in ROWS}
    times: dict[str, list[float]] = {row: [] for row in ROWS}
    for number in range(rounds + 1):
        for row in ROWS:
            began = time.perf_counter()
            for _ in range(2):
                steps[row](*batches[row])
            if number:  # the first round warms up
                times[row].append((time.perf_counter() - began) / 2 * count / images_of(row, count))
    context = multiprocessing.get_context("spawn")
    print(f"\n{arch}, {size} px, batch {count}, {rounds} rounds, {torch.get_num_threads()} threads")
    print(f"{'':16} {'ms':>6} {'÷ vanilla':>10} {'(min–max)':>13} {'bound':>6} {'peak MB':>8}")
    for row in ROWS:
        queue = context.Queue()
        process = context.Process(target=peak_mb, args=(arch, row, size, count, queue))
        process.start()
        memory = queue.get()
        process.join()
        ratios = [time / vanilla for time, vanilla in zip(times[row], times["vanilla"], strict=True)]
        bound = f"{BOUNDS[row]:.2f}" if row in BOUNDS else ""
        spread = f"({min(ratios):.2f}–{max(ratios):.2f})"
        print(
            f"{row:16} {1000 * statistics.median(times[row]):6.0f} {statistics.median(ratios):10.2f} {spread:>13} "
            f"{bound:>6} {memory:8.0f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", nargs="+", default=["resnet18", "efficientnet_b0"], help="architectures, by their timm names"
    )
    parser.add_argument("--size", type=int, default=64, help="image size, in pixels")
    parser.add_argument("--batch", type=int, default=32, help="images per step")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    for arch in arguments.arch:
        measure(arch, arguments.size, arguments.batch, arguments.rounds)


if __name__ == "__main__":
    main()
