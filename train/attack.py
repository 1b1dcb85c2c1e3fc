"""L-inf PGD in the space of normalised images, with ε in units of a pixel.

Shape suffixes: N images, C channels, H height, W width, K classes.

As published for AdvProp: the gradient is taken through the given BatchNorm route on its
*running* statistics, nothing is updated, and parameters need no gradient (so none is
computed, which makes a step cost two forward-equivalents and not three).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from train.config import AttackConfig
from train.dual_bn import route

__all__ = ["LinfPGD", "evaluating", "frozen"]


class LinfPGD:
    """Makes adversarial images. One object serves any number of models and batches."""

    def __init__(self, config: AttackConfig, mean: Sequence[float], std: Sequence[float]) -> None:
        """
        Args:
            config: strength and kind of the attack.
            mean: per-channel mean the images were normalised with, of pixels in [0, 1].
            std: per-channel standard deviation likewise.
        """
        self.config = config
        self._mean_C11 = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self._std_C11 = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)

    def __call__(self, model: nn.Module, images_NCHW: torch.Tensor, labels_N: torch.Tensor, bn: str) -> torch.Tensor:
        """Attacks `model` through BatchNorm route `bn`.

        Args:
            model: left as it was found: its mode, statistics, gradients and `requires_grad`.
            images_NCHW: normalised float images.
            labels_N: int64 true classes.
            bn: route the gradient goes through.

        Returns:
            Images within ε of the given ones and, where those are, within the pixel range;
            same shape, dtype and memory format, detached.
        """
        config = self.config
        pixel_C11 = (1 / 255 / self._std_C11).to(images_NCHW.device)
        epsilon_C11 = config.epsilon * pixel_C11
        # A pixel that is outside the range already (noise of an augmentation, say) may
        # stay there: pulling it in would move it by more than ε.
        black_C11 = ((0 - self._mean_C11) / self._std_C11).to(images_NCHW.device)
        white_C11 = ((1 - self._mean_C11) / self._std_C11).to(images_NCHW.device)
        clean = images_NCHW.detach()
        lowest = torch.maximum(clean - epsilon_C11, torch.minimum(clean, black_C11))
        highest = torch.minimum(clean + epsilon_C11, torch.maximum(clean, white_C11))

        with frozen(model), evaluating(model), route(model, bn):
            attacked = torch.clamp(clean + self._start(clean, epsilon_C11), lowest, highest)
            goal_N: torch.Tensor | None = None
            for _ in range(config.resolved_steps):
                attacked.requires_grad_(True)
                with torch.enable_grad():
                    logits_NK = model(attacked)
                    if goal_N is None:
                        goal_N = self._goal(labels_N, logits_NK.shape[1])
                    loss = F.cross_entropy(logits_NK, goal_N, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, attacked)
                direction = -1 if config.targeted else 1
                step = gradient.sign() * (direction * config.step_size * pixel_C11)
                attacked = torch.clamp(attacked.detach() + step, lowest, highest)
        return attacked

    def _start(self, clean: torch.Tensor, epsilon_C11: torch.Tensor) -> torch.Tensor:
        """Uniform noise in ±ε, except for the share of images that start from themselves."""
        noise = torch.empty_like(clean).uniform_(-1, 1) * epsilon_C11
        chance_N111 = torch.rand(clean.shape[0], 1, 1, 1, device=clean.device)
        return noise * (chance_N111 >= self.config.clean_start_share)

    def _goal(self, labels_N: torch.Tensor, classes: int) -> torch.Tensor:
        """The class whose loss is followed: a random wrong one, or the true one."""
        if not self.config.targeted:
            return labels_N
        shift_N = torch.randint(1, classes, labels_N.shape, device=labels_N.device)
        return (labels_N + shift_N) % classes


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Parameters need no gradient while the context lasts."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module is in evaluation mode while the context lasts, then as it was before."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def evaluation_attack(config: AttackConfig, mean: Sequence[float], std: Sequence[float]) -> LinfPGD:
    """The attack that validation reports: untargeted PGD-5 at the training ε.

    Step size 2.5 ε / steps, as in Madry et al. (2018), from a random start.
    """
    steps = 5
    stronger = AttackConfig(
        epsilon=config.epsilon,
        steps=steps,
        step_size=2.5 * config.epsilon / steps,
        targeted=False,
        clean_start_share=0.0,
    )
    return LinfPGD(stronger, mean, std)


def accuracy(logits_NK: torch.Tensor, labels_N: torch.Tensor) -> int:
    """Returns how many of the N answers are right."""
    return int((logits_NK.argmax(1) == labels_N).sum().item())
