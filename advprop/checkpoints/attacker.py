"""Create adversarial images with the gradient of a checkpoint. All images are uint8.

The adversarial images are evaluated on the checkpoint itself and on model files, which have no
gradient.

Shape suffixes: A adversarial copies of each image, N images, C channels, H height, W width,
K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from advprop.checkpoints import LoadedAttacker
from advprop.checkpoints.predictor import restore_for_evaluation
from runtime.errors import ConfigError
from runtime.evaluate.attacks.methods import Craft
from runtime.evaluate.attacks.target import rounded
from runtime.preprocessing import normalize
from runtime.spec import ModelSpec
from train.apgd import LOSSES, LinfAPGD
from train.attack import Randomness, evaluation_attack
from train.recipes import MAIN

__all__ = ["SeededNoise", "gradient_attacks", "load_attacker"]


def load_attacker(path: Path, *, route: str, device: str) -> LoadedAttacker:
    """Implement `advprop.checkpoints.load_attacker`."""
    spec, model, place, facts = restore_for_evaluation(path, route=route, device=device)
    return LoadedAttacker(spec, gradient_attacks(model, spec, place), facts)


class SeededNoise(Randomness):
    """Start points that depend on one seed per image, not on the other images of the batch."""

    def __init__(self, seeds: Sequence[int], restart: int) -> None:
        """`restart`: number of the restart; each restart draws different noise."""
        self._keys = [[seed, restart] for seed in seeds]

    def noise(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        shape = images_NCHW.shape[1:]
        drawn_NCHW = np.stack([np.random.default_rng(key).random(shape, np.float32) for key in self._keys])
        return torch.from_numpy(2 * drawn_NCHW - 1).to(images_NCHW)


def gradient_attacks(model: nn.Module, spec: ModelSpec, device: torch.device) -> Craft:
    """Return a function that attacks a network with PGD (`pgd`) or Auto-PGD (`apgd`).

    PGD is untargeted, starts from random points and takes steps of 2.5 ε / steps (Madry et al.,
    2018). Auto-PGD runs with both of its losses. Pixels are rounded only at the end of an attack.
    The function raises ConfigError for other attacks.

    Args:
        model: a network without auxiliary routes, in evaluation mode, that maps normalized images
            to logits.
        spec: normalization and classes of the network.
        device: device of the network.
    """
    mean, std = spec.preprocessing.mean, spec.preprocessing.std
    std_C11 = np.asarray(std, np.float32).reshape(-1, 1, 1)
    mean_C11 = np.asarray(mean, np.float32).reshape(-1, 1, 1)

    def craft(
        attack: str,
        images_NHWC: NDArray[np.uint8],
        labels_N: NDArray[np.int64],
        *,
        radius: int,
        seeds: Sequence[int],
        steps: int,
        restarts: int,
    ) -> NDArray[np.uint8]:
        images_NCHW = torch.from_numpy(normalize(images_NHWC, spec.preprocessing)).to(device)
        labels = torch.from_numpy(labels_N).to(device)

        def run_attacks() -> Iterator[torch.Tensor]:
            for restart in range(restarts):
                pgd = evaluation_attack(radius, mean, std, steps, SeededNoise(seeds, restart))
                if attack == "pgd":
                    yield pgd(model, images_NCHW, labels, MAIN)
                elif attack == "apgd":
                    for name in LOSSES if len(spec.classes) > 2 else ("ce",):  # DLR needs three classes
                        yield LinfAPGD(pgd, steps, LOSSES[name])(model, images_NCHW, labels, MAIN)
                else:
                    raise ConfigError(f"unknown gradient attack {attack!r}; expected pgd or apgd")

        copies = []
        for found_NCHW in run_attacks():
            pixels_NCHW = (found_NCHW.float().cpu().numpy() * std_C11 + mean_C11) * 255
            copies.append(rounded(pixels_NCHW.transpose(0, 2, 3, 1), images_NHWC, radius))
        return np.stack(copies)

    return craft
