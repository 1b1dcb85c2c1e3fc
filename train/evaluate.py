"""Accuracy on the validation images, as they are and under attack.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from train.attack import LinfPGD, evaluating
from train.distributed import world_sum
from train.dual_bn import route
from train.recipes import MAIN
from train.samples import BAD_LABEL

__all__ = ["accuracy"]


@torch.no_grad()
def accuracy(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    attack: LinfPGD | None = None,
    bn: str = MAIN,
) -> float:
    """Returns the top-1 accuracy through BatchNorm route `bn`, in [0, 1], over all processes.

    The attack's random numbers are the same at every call and leave no trace in the
    training's generators.

    Args:
        model: left in the mode it was in.
        batches: normalized images (N, C, H, W) and int64 labels (N,), on the model's device;
            images with the label BAD_LABEL do not count.
        attack: attack the images first, white-box through the same route.
        bn: the route. Without any image the result is 0.

    Raises:
        ConfigError: the model has no such route.
    """
    device = next(model.parameters()).device
    right, total = torch.zeros(2, dtype=torch.float64, device=device)
    devices = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), evaluating(model), route(model, bn):
        torch.manual_seed(0)
        for images_NCHW, labels_N in batches:
            known_N = labels_N != BAD_LABEL
            if attack is not None:
                # A wrong label is as good as any for images that do not count.
                images_NCHW = attack(model, images_NCHW, labels_N.clamp(min=0), bn)
            right += ((model(images_NCHW).argmax(1) == labels_N) & known_N).sum()
            total += known_N.sum()
    right, total = world_sum(torch.stack([right, total])).tolist()
    return float(right / max(1.0, total))
