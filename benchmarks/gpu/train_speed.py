"""Measure the images per second of each recipe on a GPU, eager and compiled, relative to vanilla.

    python -m benchmarks.gpu.train_speed    efficientnet_b3 at 300 px, resnet50 at 224 px, bf16
    python -m benchmarks.gpu.train_speed --batch 64 --steps 30
    python -m benchmarks.gpu.train_speed --archs resnet50 --modes eager

Each row shows clean images per second, the ratio to vanilla with the same network and mode, and the
peak memory. "reference" is the step of benchmarks/train_step.py, with PGD-1 like
advprop. docs/results/gpu.md holds what was run. For accuracy on a GPU, run benchmarks/recipes.py with
--epochs 100 --seeds 0 1 2 --amp bf16.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from benchmarks.train_step import CLASSES, our_step, reference_step
from train.recipes import RECIPES

NETS = {"efficientnet_b3": 300, "resnet50": 224}
MODES = ("eager", "compiled")
ROWS = ("vanilla", "advprop", "reference", "shared-bn", "fine-grained", "fast")


def measure(arch: str, row: str, compiled: bool, batch: int, steps: int) -> tuple[float, float]:
    """Return clean images per second, and the peak of the allocated memory in GB."""
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    if row == "reference":
        step = reference_step(arch, 1, "cuda", torch.bfloat16)
    else:
        step = our_step(arch, row, 1, "cuda", torch.bfloat16, compiled)
    views = 1 if row == "reference" else RECIPES[row].views
    images = torch.rand(batch, views, 3, NETS[arch], NETS[arch], device="cuda") * 2 - 1
    if views == 1:
        kind = torch.contiguous_format if row == "reference" else torch.channels_last
        images = images[:, 0].contiguous(memory_format=kind)
    labels = torch.randint(0, CLASSES, (batch,), device="cuda")
    for _ in range(5):
        step(images, labels)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step(images, labels)
    torch.cuda.synchronize()
    return batch * steps / (time.perf_counter() - began), torch.cuda.max_memory_allocated() / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, help="clean images per step")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--archs", nargs="+", choices=NETS, default=list(NETS), help="architectures")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="eager, compiled or both")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs an NVIDIA GPU, and torch finds none", file=sys.stderr)
        return 2
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}")
    for arch in arguments.archs:
        for mode in arguments.modes:
            vanilla = 0.0
            for row in ROWS:
                if mode == "compiled" and row == "reference":
                    continue  # the reference is not compiled
                speed, memory = measure(arch, row, mode == "compiled", arguments.batch, arguments.steps)
                vanilla = vanilla or speed
                print(
                    f"{arch:16} {mode:9} {row:13} {speed:8.0f} img/s  {vanilla / speed:5.2f}x  {memory:5.1f} GB",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
