"""A checkpoint as something that attacks: uint8 images in, adversarial uint8 images out.

What it makes is shown to the checkpoint itself, and to model files, which have no gradient of their own.

Shape suffixes: A attacked copies of each image, N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from advprop.checkpoints.predictor import restore_for_evaluation
from runtime.errors import ConfigError
from runtime.evaluate.attacks.methods import Craft
from runtime.evaluate.attacks.target import rounded
from runtime.preprocessing import normalize
from runtime.spec import ModelSpec
from train.apgd import LOSSES, LinfAPGD
from train.attack import Randomness, evaluation_attack
from train.recipes import MAIN

__all__ = ["SeededNoise", "crafter", "load_attacker"]


def load_attacker(path: Path, *, route: str = MAIN, device: str = "auto") -> tuple[ModelSpec, Craft, dict[str, Any]]:
    """Loads a checkpoint to attack with; see `runtime.evaluate.attacks.methods`.

    Args:
        path: one of our checkpoints.
        route: the BatchNorms that the gradient goes through.
        device: `auto` (a GPU where there is one), `cpu` or `cuda`.

    Returns:
        Its description; the function that attacks; and what a result says of it, plain values.

    Raises:
        CheckpointError: not a checkpoint of ours.
        ConfigError: it has no such route.
        BackendUnavailable: there is no GPU for `cuda`.
    """
    spec, model, place, facts = restore_for_evaluation(path, route=route, device=device)
    return spec, crafter(model, spec, place), facts


class SeededNoise(Randomness):
    """Starts that follow from a seed an image, whichever images are beside it."""

    def __init__(self, seeds: Sequence[int], start: int) -> None:
        """`start`: the number of the restart."""
        self._keys = [[seed, start] for seed in seeds]

    def noise(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        shape = images_NCHW.shape[1:]
        drawn_NCHW = np.stack([np.random.default_rng(key).random(shape, np.float32) for key in self._keys])
        return torch.from_numpy(2 * drawn_NCHW - 1).to(images_NCHW)


def crafter(model: nn.Module, spec: ModelSpec, place: torch.device) -> Craft:
    """Returns what attacks a network by PGD (`pgd`) and Auto-PGD with both of its losses (`apgd`).

    PGD is untargeted, from random starts, with steps of 2.5 ε / steps (Madry et al., 2018). Both walk in pixels that
    are not rounded, and are rounded at the end.

    Args:
        model: a plain network in evaluation mode, from normalized images to logits, on `place`.
        spec: how its input is normalized, and how many classes it has.
        place: the device it is on.
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
        images_NCHW = torch.from_numpy(normalize(images_NHWC, spec.preprocessing)).to(place)
        labels = torch.from_numpy(labels_N).to(place)

        def attacked() -> Iterator[torch.Tensor]:
            for start in range(restarts):
                pgd = evaluation_attack(radius, mean, std, steps, SeededNoise(seeds, start))
                if attack == "pgd":
                    yield pgd(model, images_NCHW, labels, MAIN)
                elif attack == "apgd":
                    for name in LOSSES if len(spec.classes) > 2 else ("ce",):  # of two classes DLR says nothing
                        yield LinfAPGD(pgd, steps, LOSSES[name])(model, images_NCHW, labels, MAIN)
                else:
                    raise ConfigError(f"no attack {attack!r} by gradient; expected pgd or apgd")

        copies = []
        for found_NCHW in attacked():
            pixels_NCHW = (found_NCHW.float().cpu().numpy() * std_C11 + mean_C11) * 255
            copies.append(rounded(pixels_NCHW.transpose(0, 2, 3, 1), images_NHWC, radius))
        return np.stack(copies)

    return craft
