"""Script of test_distributed.py, alone or under torchrun: some steps, their mean losses as JSON.

Start points and targets of the attack are computed from the pixels of each image, so they do not
depend on how many processes share a batch. The steps use float64: the attack takes the sign of a
gradient, and in float32 another order of additions flips the signs of tiny ones.
"""

import json
import sys
from pathlib import Path

import torch

from train.attack import Randomness
from train.config import AttackConfig, DataConfig, OptimConfig, TrainConfig
from train.distributed import process_group, rank, shuffled_across_processes, world_size, world_sum
from train.loop import Trainer
from train.reporting import SilentReporter


class FromPixels(Randomness):
    def noise(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return torch.sin(images_NCHW.double() * 12345.678).to(images_NCHW.dtype)

    def chance(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return self.noise(images_NCHW.mean((1, 2, 3), keepdim=True)).abs()

    def shift(self, labels_N: torch.Tensor, classes: int) -> torch.Tensor:
        return labels_N % (classes - 1) + 1


STEPS = {"advprop": 20, "fast": 8, "shared-statistics": 8}


def train(recipe: str, batch_size: int, out: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    with process_group(torch.device("cpu")) as device:
        config = TrainConfig(
            arch="resnet10t",
            recipe=recipe,
            epochs=1,
            batch_size=batch_size // world_size(),
            out=out,
            attack=AttackConfig(epsilon=2.0, steps=2) if recipe != "fast" else AttackConfig(),
            data=DataConfig(img_size=16, workers=0),
            optim=OptimConfig(lr=1e-3, optimizer="sgd", warmup_epochs=0.0),
        )
        trainer = Trainer(config, SilentReporter(), device, FromPixels())
        trainer.task.train()
        trainer.batches.start_at(0)
        losses = []
        for number, (images, labels) in enumerate(trainer.batches):
            if number == STEPS[recipe]:
                break
            loss = trainer.step(images.double(), labels, group=1, update=True)
            losses.append(world_sum(loss).item() / world_size())
        if rank() == 0:
            (out / "losses.json").write_text(json.dumps(losses))


def shuffle(out: Path) -> None:
    """Shuffle images whose pixels and labels encode their process, and write the result."""
    with process_group(torch.device("cpu")):
        labels = torch.arange(64) + 64 * rank()
        images, received = shuffled_across_processes(labels.view(-1, 1, 1, 1).double(), labels)
        (out / f"{rank()}.json").write_text(json.dumps([images.flatten().tolist(), received.tolist()]))


if __name__ == "__main__" and sys.argv[1] == "shuffle":
    shuffle(Path(sys.argv[3]))
elif __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
