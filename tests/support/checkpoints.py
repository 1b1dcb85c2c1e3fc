"""Checkpoints for tests, and their comparison."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tests.support.evaluation_sets import spec_of
from train.checkpoint import save_checkpoint


def save_resnet10t(path: Path, model: nn.Module, images_NHWC: NDArray[np.uint8], recipe: str = "vanilla") -> Path:
    """Write an untrained ResNet-10-T of three classes as a checkpoint with sample images."""
    content = {
        "arch": "resnet10t",
        "model_kwargs": {"num_classes": 3},
        "recipe": recipe,
        "spec": dataclasses.replace(spec_of(), arch="resnet10t").to_json(),
        "state_dict": model.state_dict(),
        "ema_state_dict": None,
        "epoch": 0,
        "step": 0,
        "sample": {"images": torch.from_numpy(images_NHWC), "labels": torch.zeros(len(images_NHWC))},
    }
    save_checkpoint(path, content)
    return path


def same(first: object, second: object) -> bool:
    """Return whether two nested values of a checkpoint are equal bit by bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second
