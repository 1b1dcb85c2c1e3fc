"""Auto-PGD in the L-inf ball: PGD that sets its own step size.

Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks" (ICML 2020), algorithm 1 (APGD), section 3 (where the step is halved) and section 4.1 (the DLR loss).

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from train.attack import LOSS_SCALE, Ball, LinfPGD, evaluating, frozen
from train.dual_bn import route

__all__ = ["LOSSES", "LinfAPGD", "checkpoints", "cross_entropy", "dlr"]

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Logits (N, K) and labels (N,) → losses, (N,)."""

_MOMENTUM = 0.75
"""α: share of the new step; the rest is the step before."""
_PROGRESS = 0.75
"""ρ: the step is halved where fewer of the steps than this made the loss larger."""


def cross_entropy(logits_NK: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Returns the loss that training minimizes."""
    return F.cross_entropy(logits_NK, labels_N, reduction="none")


def dlr(logits_NK: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Returns the difference-of-logits ratio: unlike cross-entropy it does not vanish where the network is sure.

    The largest wrong logit less the right one, over the largest less the third largest. It needs three classes.
    """
    three_N3 = logits_NK.topk(3, dim=1).values
    own_N = logits_NK.gather(1, labels_N[:, None])[:, 0]
    right_N = logits_NK.argmax(1) == labels_N
    other_N = torch.where(right_N, three_N3[:, 1], three_N3[:, 0])
    return (other_N - own_N) / (three_N3[:, 0] - three_N3[:, 2] + 1e-12)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dlr": dlr}
"""What APGD makes larger, by name."""


def checkpoints(steps: int) -> list[int]:
    """Returns after how many steps the step size is looked at, in order (equation 2 ff. of the paper)."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    # Less a little, so that 0.57 · 100, which is 57.000…01 in binary, is 57.
    return sorted({math.ceil(share * steps - 1e-9) for share in shares if share <= 1} - {0})


@dataclass(slots=True)
class _Point:
    """Where a search is, image by image."""

    images_NCHW: torch.Tensor
    loss_N: torch.Tensor
    gradient_NCHW: torch.Tensor
    fooled_N: torch.Tensor

    def take(self, where_N: torch.Tensor, other: _Point) -> _Point:
        """Returns the other's point for the images of `where_N`, and its own for the others."""

        def chosen(name: str) -> torch.Tensor:
            own, others = getattr(self, name), getattr(other, name)
            return torch.where(where_N.view(-1, *[1] * (own.ndim - 1)), others, own)

        return _Point(*(chosen(field.name) for field in dataclasses.fields(self)))


class LinfAPGD:
    """Makes adversarial images. One object serves any number of models and batches."""

    def __init__(self, pgd: LinfPGD, steps: int, loss: Loss = cross_entropy) -> None:
        """
        Args:
            pgd: whose ball, start and randomness it uses; its steps and step size are not used.
            steps: gradients; the paper takes 100.
            loss: what is made larger.
        """
        self._pgd, self._steps, self._loss = pgd, steps, loss

    def __call__(self, model: nn.Module, images_NCHW: torch.Tensor, labels_N: torch.Tensor, bn: str) -> torch.Tensor:
        """Attacks `model` through BatchNorm route `bn`.

        Args:
            model: left as it was found.
            images_NCHW: normalized float images.
            labels_N: int64 true classes.
            bn: route the gradient goes through.

        Returns:
            Images within ε: of all that were visited, those with the largest loss, and where any fooled the model
            the largest loss among those. Detached.
        """
        ball = self._pgd.ball(images_NCHW)
        with frozen(model), evaluating(model), route(model, bn):

            def look(at_NCHW: torch.Tensor) -> _Point:
                return self._look(model, at_NCHW, labels_N)

            return self._search(ball, look)

    def _search(self, ball: Ball, look: Callable[[torch.Tensor], _Point]) -> torch.Tensor:
        now = look(self._pgd.start(ball))
        best = strongest = now
        before_NCHW = now.images_NCHW
        count = len(now.loss_N)
        step_N = torch.full((count,), 2.0 * self._pgd.config.epsilon, device=now.loss_N.device)
        rises_N = torch.zeros_like(step_N)
        last, halved_N, best_loss_N = 0, torch.ones_like(step_N, dtype=torch.bool), best.loss_N
        looks = set(checkpoints(self._steps))
        for step in range(1, self._steps):
            length_NC11 = step_N.view(-1, 1, 1, 1) * ball.unit_C11
            ahead = _clamp(now.images_NCHW + length_NC11 * now.gradient_NCHW.sign(), ball)
            if step > 1:
                momentum = (1 - _MOMENTUM) * (now.images_NCHW - before_NCHW)
                ahead = _clamp(now.images_NCHW + _MOMENTUM * (ahead - now.images_NCHW) + momentum, ball)
            before_NCHW, loss_N = now.images_NCHW, now.loss_N
            now = look(ahead)
            rises_N += now.loss_N > loss_N
            best = best.take(now.loss_N > best.loss_N, now)
            gained_N = (now.fooled_N & ~strongest.fooled_N) | (
                (now.fooled_N == strongest.fooled_N) & (now.loss_N > strongest.loss_N)
            )
            strongest = strongest.take(gained_N, now)
            if step in looks:
                stuck_N = rises_N < _PROGRESS * (step - last)
                stuck_N |= ~halved_N & (best_loss_N == best.loss_N)
                step_N = torch.where(stuck_N, step_N / 2, step_N)
                now = now.take(stuck_N, best)
                last, halved_N, best_loss_N = step, stuck_N, best.loss_N
                rises_N = torch.zeros_like(rises_N)
        return strongest.images_NCHW

    def _look(self, model: nn.Module, images_NCHW: torch.Tensor, labels_N: torch.Tensor) -> _Point:
        images_NCHW = images_NCHW.detach().requires_grad_(True)
        with torch.enable_grad():
            logits_NK = model(images_NCHW).float()
            loss_N = self._loss(logits_NK, labels_N)
            # Scaled so that small gradients are not lost; their sign stays.
            (gradient,) = torch.autograd.grad(loss_N.sum() * LOSS_SCALE, images_NCHW)
        fooled_N = logits_NK.detach().argmax(1) != labels_N
        return _Point(images_NCHW.detach(), loss_N.detach(), gradient, fooled_N)


def _clamp(images_NCHW: torch.Tensor, ball: Ball) -> torch.Tensor:
    return torch.clamp(images_NCHW, ball.lowest, ball.highest)
