"""Accuracy on the validation images, as they are and under attack.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from train.attack import LinfPGD, correct_answers, evaluating
from train.data import BAD_LABEL
from train.distributed import world_sum
from train.dual_bn import route
from train.recipes import MAIN

__all__ = ["attacked_accuracy", "clean_accuracy"]


@torch.no_grad()
def clean_accuracy(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], bn: str = MAIN) -> float:
    """Returns the top-1 accuracy through BN route `bn`, in [0, 1]; 0 without images."""
    right = total = 0
    with evaluating(model), route(model, bn):
        for images_NCHW, labels_N in batches:
            right += correct_answers(model(images_NCHW), labels_N)
            total += int((labels_N != BAD_LABEL).sum())
    return _share(right, total, model)


@torch.no_grad()
def attacked_accuracy(
    model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], attack: LinfPGD, bn: str = MAIN
) -> float:
    """Returns the top-1 accuracy under a white-box attack through route `bn`, in [0, 1].

    The attack's random numbers are the same at every call and leave no trace in the
    training's generators.
    """
    right = total = 0
    devices = sorted({parameter.get_device() for parameter in model.parameters() if parameter.is_cuda})
    with torch.random.fork_rng(devices), evaluating(model), route(model, bn):
        torch.manual_seed(0)
        for images_NCHW, labels_N in batches:
            known = labels_N != BAD_LABEL
            images_NCHW, labels_N = images_NCHW[known], labels_N[known]
            if len(labels_N):
                attacked = attack(model, images_NCHW, labels_N, bn)
                right += correct_answers(model(attacked), labels_N)
                total += len(labels_N)
    return _share(right, total, model)


def _share(right: int, total: int, model: nn.Module) -> float:
    """right / total over all processes."""
    device = next(model.parameters()).device
    counts = world_sum(torch.tensor([right, total], dtype=torch.float64, device=device)).tolist()
    return float(counts[0] / max(1.0, counts[1]))
