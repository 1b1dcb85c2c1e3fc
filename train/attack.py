"""L-inf PGD in the space of normalized images, with ε in units of a pixel.

Shape suffixes: N images, C channels, H height, W width, K classes.

As published for AdvProp: the gradient is taken through the given BatchNorm route on its
*running* statistics, nothing is updated, and parameters need no gradient (so none is
computed, which makes a step cost two forward-equivalents and not three).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from train.config import AttackConfig
from train.dual_bn import route

__all__ = ["LOSS_SCALE", "Ball", "LinfPGD", "Randomness", "evaluating", "evaluation_attack", "frozen"]


class Randomness:
    """What an attack draws, from torch's generator of the images' device."""

    def noise(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Returns uniform noise in [-1, 1], like the images."""
        return torch.empty_like(images_NCHW).uniform_(-1, 1)

    def chance(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Returns a uniform number in [0, 1) for each image, (N, 1, 1, 1)."""
        return torch.rand(images_NCHW.shape[0], 1, 1, 1, device=images_NCHW.device)

    def shift(self, labels_N: torch.Tensor, classes: int) -> torch.Tensor:
        """Returns how far from the true class the target is, 1 to classes - 1."""
        return torch.randint(1, classes, labels_N.shape, device=labels_N.device)


LOSS_SCALE = 1024.0
"""A power of two, so that float32 gradients scale exactly."""


class Ball(NamedTuple):
    """Where the attack on a batch may go, in the normalized space."""

    clean: torch.Tensor
    """The images, (N, C, H, W), detached."""
    lowest: torch.Tensor
    """Least value of each pixel, (N, C, H, W)."""
    highest: torch.Tensor
    """Largest value likewise."""
    unit_C11: torch.Tensor
    """1/255 of the pixel range, channel by channel."""


class LinfPGD:
    """Makes adversarial images. One object serves any number of models and batches."""

    def __init__(
        self,
        config: AttackConfig,
        mean: Sequence[float],
        std: Sequence[float],
        randomness: Randomness | None = None,
    ) -> None:
        """
        Args:
            config: strength and kind of the attack.
            mean: per-channel mean the images were normalized with, of pixels in [0, 1].
            std: per-channel standard deviation likewise.
            randomness: where starts and targets come from; default: torch's generator.
        """
        self.config = config
        self._randomness = randomness or Randomness()
        self._mean_C11 = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self._std_C11 = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)

    def __call__(self, model: nn.Module, images_NCHW: torch.Tensor, labels_N: torch.Tensor, bn: str) -> torch.Tensor:
        """Attacks `model` through BatchNorm route `bn`.

        Args:
            model: left as it was found: its mode, statistics, gradients and `requires_grad`.
            images_NCHW: normalized float images.
            labels_N: int64 true classes.
            bn: route the gradient goes through.

        Returns:
            Images within ε of the given ones and, where those are, within the pixel range;
            same shape and memory format, float32 or wider, detached.
        """
        ball = self.ball(images_NCHW)
        with frozen(model), evaluating(model), route(model, bn):
            attacked = self.start(ball)
            goal_N: torch.Tensor | None = None
            for _ in range(self.config.resolved_steps):
                attacked.requires_grad_(True)
                with torch.enable_grad():
                    logits_NK = model(attacked)
                    if goal_N is None:
                        goal_N = self._goal(labels_N, logits_NK.shape[1])
                    # Scaled so that float16 does not lose a small gradient; its sign stays.
                    loss = F.cross_entropy(logits_NK, goal_N, reduction="sum") * LOSS_SCALE
                (gradient,) = torch.autograd.grad(loss, attacked)
                attacked = self.step(ball, attacked.detach(), gradient)
        return attacked

    def ball(self, images_NCHW: torch.Tensor) -> Ball:
        """Returns how far each pixel of normalized images may be moved."""
        clean = images_NCHW.detach()
        if self._std_C11.device != clean.device:  # once, not at every step: a copy waits for the GPU
            self._mean_C11, self._std_C11 = self._mean_C11.to(clean.device), self._std_C11.to(clean.device)
        unit_C11 = 1 / 255 / self._std_C11
        epsilon_C11 = self.config.epsilon * unit_C11
        black_C11, white_C11 = -self._mean_C11 / self._std_C11, (1 - self._mean_C11) / self._std_C11
        # A pixel that is outside the range already (noise of an augmentation, say) may
        # stay there: pulling it in would move it by more than ε.
        lowest = torch.maximum(clean - epsilon_C11, torch.minimum(clean, black_C11))
        highest = torch.minimum(clean + epsilon_C11, torch.maximum(clean, white_C11))
        return Ball(clean, lowest, highest, unit_C11)

    def start(self, ball: Ball) -> torch.Tensor:
        """Returns where the attack starts: uniform noise in ±ε on the clean images, except for the
        share of images that start from themselves."""
        kept_N111 = self._randomness.chance(ball.clean) >= self.config.clean_start_share
        noise = self._randomness.noise(ball.clean) * (self.config.epsilon * ball.unit_C11) * kept_N111
        return torch.clamp(ball.clean + noise, ball.lowest, ball.highest)

    def step(self, ball: Ball, attacked_NCHW: torch.Tensor, gradient_NCHW: torch.Tensor) -> torch.Tensor:
        """Returns the images one step along (targeted: against) the sign of the loss's gradient."""
        length_C11 = self.config.step_size * (-1 if self.config.targeted else 1) * ball.unit_C11
        return torch.clamp(attacked_NCHW + gradient_NCHW.sign() * length_C11, ball.lowest, ball.highest)

    def _goal(self, labels_N: torch.Tensor, classes: int) -> torch.Tensor:
        """The class whose loss is followed: a random wrong one, or the true one."""
        if not self.config.targeted:
            return labels_N
        return (labels_N + self._randomness.shift(labels_N, classes)) % classes


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


def evaluation_attack(
    epsilon: float,
    mean: Sequence[float],
    std: Sequence[float],
    steps: int = 5,
    randomness: Randomness | None = None,
) -> LinfPGD:
    """The attack that validation reports: untargeted PGD at `epsilon`/255.

    Step size 2.5 ε / steps, as in Madry et al. (2018), from a random start.
    """
    stronger = AttackConfig(
        epsilon=epsilon,
        steps=steps,
        step_size=2.5 * epsilon / steps,
        targeted=False,
        clean_start_share=0.0,
    )
    return LinfPGD(stronger, mean, std, randomness)
