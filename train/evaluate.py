"""Accuracy on the validation images, as they are and under attack.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import torch
from torch import nn

from train.attack import LinfPGD, accuracy, evaluating
from train.data import BAD_LABEL, Batches
from train.dual_bn import route
from train.recipes import MAIN

__all__ = ["attacked_accuracy", "clean_accuracy"]


@torch.no_grad()
def clean_accuracy(model: nn.Module, batches: Batches, bn: str = MAIN) -> float:
    """Returns the top-1 accuracy through BN route `bn`, in [0, 1]; 0 without images."""
    right = total = 0
    with evaluating(model), route(model, bn):
        for images_NCHW, labels_N in batches:
            right += accuracy(model(images_NCHW), labels_N)
            total += int((labels_N != BAD_LABEL).sum())
    return right / max(1, total)


@torch.no_grad()
def attacked_accuracy(model: nn.Module, batches: Batches, attack: LinfPGD, bn: str = MAIN) -> float:
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
                right += accuracy(model(attacked), labels_N)
                total += len(labels_N)
    return right / max(1, total)
