"""Images a second of each recipe on a GPU, compiled and not, each beside vanilla.

    python benchmarks/gpu/train_speed.py                    efficientnet_b3 at 300 px, resnet50 at 224 px, bf16
    python benchmarks/gpu/train_speed.py --batch 64 --steps 30

Not executed so far. Prints one line a row: clean images a second, ratio to vanilla of the
same net and mode, peak memory allocated.
"""

from __future__ import annotations

import argparse
import sys
import time

import timm
import torch

from train.config import AttackConfig
from train.recipes import RECIPES
from train.task import AdvPropTask

NETS = {"efficientnet_b3": 300, "resnet50": 224}
MEAN = STD = (0.5, 0.5, 0.5)


def measure(arch: str, recipe: str, compiled: bool, batch: int, steps: int) -> tuple[float, float]:
    """Returns clean images a second and the peak of allocated memory in GB."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    model = timm.create_model(arch, num_classes=1000).to(device).to(memory_format=torch.channels_last)
    attack = AttackConfig(targeted=recipe != "fast")
    task = AdvPropTask(
        model, RECIPES[recipe], attack=attack, mean=MEAN, std=STD, amp_dtype=torch.bfloat16, device=device
    ).train()
    if compiled:
        task.compile()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    views = RECIPES[recipe].views
    shape = (batch, 3, NETS[arch], NETS[arch]) if views == 1 else (batch, views, 3, NETS[arch], NETS[arch])
    images = torch.rand(shape, device=device) * 2 - 1
    if views == 1:
        images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        task(images, labels)["loss"].backward()
        optimizer.step()

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return batch * steps / (time.perf_counter() - began), torch.cuda.max_memory_allocated() / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs an NVIDIA GPU; torch finds none", file=sys.stderr)
        return 2
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}")
    for arch in NETS:
        for compiled in (False, True):
            vanilla = 0.0
            for recipe in ("vanilla", "advprop", "shared-bn", "fine-grained", "fast"):
                speed, memory = measure(arch, recipe, compiled, arguments.batch, arguments.steps)
                vanilla = vanilla or speed
                mode = "compiled" if compiled else "eager"
                print(f"{arch:16} {mode:9} {recipe:13} {speed:8.0f} img/s  {vanilla / speed:5.2f}x  {memory:5.1f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
