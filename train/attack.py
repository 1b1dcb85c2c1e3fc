"""L-inf PGD on normalized images with ε in 1/255 of the pixel range, and accuracy under it.

Shape suffixes: N images, C channels, H height, W width, K classes.

As published for AdvProp, the gradient goes through one BatchNorm route on its *running*
statistics and updates none of them. Gradients of parameters are not computed, so a PGD step costs
as much as two forward passes instead of three.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from train.config import AttackConfig
from train.distributed import world_sum
from train.dual_bn import route
from train.recipes import MAIN
from train.samples import BAD_LABEL

__all__ = [
    "LOSS_SCALE",
    "Ball",
    "LinfPGD",
    "Quality",
    "Randomness",
    "accuracy",
    "at_least_float32",
    "eval_mode",
    "evaluation_attack",
    "frozen",
    "measure_quality",
]


class Randomness:
    """The random numbers of an attack, from torch's generator of the images' device."""

    def noise(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Return uniform noise in [-1, 1] with the shape, dtype and device of the images."""
        return torch.empty_like(images_NCHW).uniform_(-1, 1)

    def chance(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Return a uniform number in [0, 1) for each image, (N, 1, 1, 1)."""
        return torch.rand(images_NCHW.shape[0], 1, 1, 1, device=images_NCHW.device)

    def shift(self, labels_N: torch.Tensor, classes: int) -> torch.Tensor:
        """Return the distance from the true to the target class, 1 to `classes - 1`, (N,)."""
        return torch.randint(1, classes, labels_N.shape, device=labels_N.device)


LOSS_SCALE = 1024.0
"""Factor of an attack's loss. It is a power of two, so float32 gradients scale exactly."""


def at_least_float32(logits_NK: torch.Tensor) -> torch.Tensor:
    """Return logits in float32, or unchanged if they are wider.

    Losses need it. On a GPU, autocast computes them in float32; on a CPU, in the type of the logits.
    """
    return logits_NK.to(torch.promote_types(logits_NK.dtype, torch.float32))


class Ball(NamedTuple):
    """The adversarial images that an attack on one batch may produce, in normalized units."""

    clean: torch.Tensor
    """The attacked images, (N, C, H, W), detached."""
    lowest: torch.Tensor
    """Minimum of each pixel, (N, C, H, W)."""
    highest: torch.Tensor
    """Maximum of each pixel, (N, C, H, W)."""
    unit_C11: torch.Tensor
    """1/255 of the pixel range of each channel."""


class LinfPGD:
    """Creates adversarial images. One object works with any number of models and batches."""

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
            mean: mean of each channel that the images are normalized with, for pixels in [0, 1].
            std: standard deviation of each channel that the images are normalized with.
            randomness: source of start points and target classes (default: torch's generator).
        """
        self.config = config
        self._randomness = randomness or Randomness()
        self._mean_C11 = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self._std_C11 = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)

    def __call__(self, model: nn.Module, images_NCHW: torch.Tensor, labels_N: torch.Tensor, bn: str) -> torch.Tensor:
        """Attack `model` through BatchNorm route `bn`.

        Args:
            model: the attacked network. Its mode, statistics, gradients and `requires_grad` flags
                are the same before and after the call.
            images_NCHW: normalized float images.
            labels_N: int64 true classes.
            bn: route that the gradient goes through.

        Returns:
            Images within ε of the input and inside the pixel range (except pixels that were
            outside before). Same shape and memory format, float32 or wider, detached.
        """
        ball = self.ball(images_NCHW)
        with frozen(model), eval_mode(model), route(model, bn):
            attacked = self.start(ball)
            goal_N: torch.Tensor | None = None
            for _ in range(self.config.resolved_steps):
                attacked.requires_grad_(True)
                with torch.enable_grad():
                    logits_NK = model(attacked)
                    if goal_N is None:
                        goal_N = self.goal(labels_N, logits_NK.shape[1])
                    # The scale keeps small gradients from vanishing in float16; only signs matter.
                    loss = F.cross_entropy(at_least_float32(logits_NK), goal_N, reduction="sum") * LOSS_SCALE
                (gradient,) = torch.autograd.grad(loss, attacked)
                attacked = self.step(ball, attacked.detach(), gradient)
        return attacked

    def ball(self, images_NCHW: torch.Tensor) -> Ball:
        """Return the bounds of each pixel of normalized images."""
        clean = images_NCHW.detach()
        if self._std_C11.device != clean.device:  # once, not at each step: the copy waits for the GPU
            self._mean_C11, self._std_C11 = self._mean_C11.to(clean.device), self._std_C11.to(clean.device)
        unit_C11 = 1 / 255 / self._std_C11
        epsilon_C11 = self.config.epsilon * unit_C11
        black_C11, white_C11 = -self._mean_C11 / self._std_C11, (1 - self._mean_C11) / self._std_C11
        # A pixel outside the range (for example noise from an augmentation) may stay there:
        # pulling it inside would move it by more than ε.
        lowest = torch.maximum(clean - epsilon_C11, torch.minimum(clean, black_C11))
        highest = torch.minimum(clean + epsilon_C11, torch.maximum(clean, white_C11))
        return Ball(clean, lowest, highest, unit_C11)

    def start(self, ball: Ball) -> torch.Tensor:
        """Return the start points: clean images plus uniform noise in ±ε.

        A share of the images, `config.clean_start_share` on average, starts without noise.
        """
        noisy_N111 = self._randomness.chance(ball.clean) >= self.config.clean_start_share
        noise = self._randomness.noise(ball.clean) * (self.config.epsilon * ball.unit_C11) * noisy_N111
        return torch.clamp(ball.clean + noise, ball.lowest, ball.highest)

    def step(self, ball: Ball, attacked_NCHW: torch.Tensor, gradient_NCHW: torch.Tensor) -> torch.Tensor:
        """Return the images moved by one step along the sign of the loss gradient.

        A targeted attack moves against it.
        """
        length_C11 = self.config.step_size * (-1 if self.config.targeted else 1) * ball.unit_C11
        return torch.clamp(attacked_NCHW + gradient_NCHW.sign() * length_C11, ball.lowest, ball.highest)

    def goal(self, labels_N: torch.Tensor, classes: int) -> torch.Tensor:
        """Return the class of each image whose loss gradient the attack uses, int64, (N,).

        A targeted attack draws a random wrong class; an untargeted one uses the true class.
        """
        if not self.config.targeted:
            return labels_N
        return (labels_N + self._randomness.shift(labels_N, classes)) % classes


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters inside the context."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode inside the context, then restore each one's mode."""
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
    """Return the attack used in validation: untargeted PGD at `epsilon`/255 from a random start.

    The step size is 2.5 ε / steps, as in Madry et al. (2018).
    """
    config = AttackConfig(
        epsilon=epsilon,
        steps=steps,
        step_size=2.5 * epsilon / steps,
        targeted=False,
        clean_start_share=0.0,
    )
    return LinfPGD(config, mean, std, randomness)


class Quality(NamedTuple):
    """Accuracy and loss on labeled images."""

    top1: float
    """Top-1 accuracy, in [0, 1]."""
    loss: float
    """Mean cross-entropy, without label smoothing."""


def accuracy(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    attack: LinfPGD | None = None,
    bn: str = MAIN,
) -> float:
    """Return the top-1 accuracy that `measure_quality` measures."""
    return measure_quality(model, batches, attack, bn).top1


@torch.no_grad()
def measure_quality(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    attack: LinfPGD | None = None,
    bn: str = MAIN,
) -> Quality:
    """Return the accuracy and loss through BatchNorm route `bn`, over all processes.

    The attack draws the same random numbers in every call and does not advance the random
    generators of the training.

    Args:
        model: the network; its mode is the same before and after the call.
        batches: normalized images (N, C, H, W) and int64 labels (N,) on the model's device.
            Images with the label BAD_LABEL are not counted; without any image the result is 0.
        attack: white-box attack on the images, through the same route (default: clean accuracy).
        bn: the BatchNorm route.

    Raises:
        ConfigError: the model has no such route.
    """
    device = next(model.parameters()).device
    correct, total, losses = torch.zeros(3, dtype=torch.float64, device=device)
    devices = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), eval_mode(model), route(model, bn):
        torch.manual_seed(0)
        for images_NCHW, labels_N in batches:
            known_N = labels_N != BAD_LABEL
            if attack is not None:
                # Images that are not counted get class 0: the attack needs some valid label.
                images_NCHW = attack(model, images_NCHW, labels_N.clamp(min=0), bn)
            logits_NK = model(images_NCHW)
            correct += ((logits_NK.argmax(1) == labels_N) & known_N).sum()
            losses += F.cross_entropy(logits_NK.float(), labels_N, ignore_index=BAD_LABEL, reduction="sum")
            total += known_N.sum()
    correct, total, losses = world_sum(torch.stack([correct, total, losses])).tolist()
    return Quality(float(correct / max(1.0, total)), float(losses / max(1.0, total)))
