"""Auto-PGD in the L-inf ball: PGD that adapts its step size.

Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks" (ICML 2020): algorithm 1 (APGD), section 3 (halving of the step size) and
section 4.1 (the DLR loss).

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

from train.attack import LOSS_SCALE, Ball, LinfPGD, eval_mode, frozen
from train.dual_bn import route

__all__ = ["LOSSES", "LinfAPGD", "cross_entropy", "dlr", "step_size_checks"]

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Logits (N, K) and labels (N,) → losses, (N,)."""

_MOMENTUM = 0.75
"""α: weight of the new step; the previous step gets the rest."""
_PROGRESS = 0.75
"""ρ: the step size is halved if a smaller share of the steps than this increased the loss."""


def cross_entropy(logits_NK: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each image, (N,)."""
    return F.cross_entropy(logits_NK, labels_N, reduction="none")


def dlr(logits_NK: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Return the difference-of-logits ratio of each image, (N,).

    Its numerator is the largest wrong logit minus the true one, its denominator the largest
    logit minus the third largest. Unlike cross-entropy it does not vanish if the network is
    confident. It needs at least three classes.
    """
    top_N3 = logits_NK.topk(3, dim=1).values
    true_N = logits_NK.gather(1, labels_N[:, None])[:, 0]
    correct_N = logits_NK.argmax(1) == labels_N
    wrong_N = torch.where(correct_N, top_N3[:, 1], top_N3[:, 0])
    return (wrong_N - true_N) / (top_N3[:, 0] - top_N3[:, 2] + 1e-12)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dlr": dlr}
"""The losses that APGD can maximize, by name."""


def step_size_checks(steps: int) -> list[int]:
    """Return the step numbers at which the step size may be halved (the paper's "checkpoints").

    They are ascending; source: section 3.1, equation 2 and the lines below it.
    """
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    # The small correction makes 0.57 · 100, which is 57.000…01 in binary, round up to 57.
    return sorted({math.ceil(share * steps - 1e-9) for share in shares if share <= 1} - {0})


@dataclass(slots=True)
class _Point:
    """One candidate per image, with the network's response to it."""

    images_NCHW: torch.Tensor
    loss_N: torch.Tensor
    gradient_NCHW: torch.Tensor
    fooled_N: torch.Tensor

    def updated(self, where_N: torch.Tensor, other: _Point) -> _Point:
        """Return this point with the images of `where_N` replaced by the other point's."""

        def select(name: str) -> torch.Tensor:
            own, others = getattr(self, name), getattr(other, name)
            return torch.where(where_N.view(-1, *[1] * (own.ndim - 1)), others, own)

        return _Point(*(select(field.name) for field in dataclasses.fields(self)))


class LinfAPGD:
    """Creates adversarial images. One object works with any number of models and batches."""

    def __init__(self, pgd: LinfPGD, steps: int, loss: Loss = cross_entropy) -> None:
        """
        Args:
            pgd: provides ball, start points and randomness; its steps and step size are ignored.
            steps: number of gradients; the paper uses 100.
            loss: the loss that is maximized.
        """
        self._pgd, self._steps, self._loss = pgd, steps, loss

    def __call__(self, model: nn.Module, images_NCHW: torch.Tensor, labels_N: torch.Tensor, bn: str) -> torch.Tensor:
        """Attack `model` through BatchNorm route `bn`.

        Args:
            model: the attacked network; its mode and flags are the same before and after the call.
            images_NCHW: normalized float images.
            labels_N: int64 true classes.
            bn: route that the gradient goes through.

        Returns:
            Images within ε, detached. For each image it is the candidate with the largest loss,
            among the candidates that fool the model, if any candidate does.
        """
        ball = self._pgd.ball(images_NCHW)
        with frozen(model), eval_mode(model), route(model, bn):
            return self._search(ball, lambda candidates_NCHW: self._evaluate(model, candidates_NCHW, labels_N))

    def _search(self, ball: Ball, evaluate: Callable[[torch.Tensor], _Point]) -> torch.Tensor:
        current = evaluate(self._pgd.start(ball))
        best = strongest = current
        previous_NCHW = current.images_NCHW
        step_N = torch.full((len(current.loss_N),), 2.0 * self._pgd.config.epsilon, device=current.loss_N.device)
        increases_N = torch.zeros_like(step_N)
        last_check, halved_N, checked_loss_N = 0, torch.ones_like(step_N, dtype=torch.bool), best.loss_N
        checks = set(step_size_checks(self._steps))
        for step in range(1, self._steps):
            length_NC11 = step_N.view(-1, 1, 1, 1) * ball.unit_C11
            ahead = _clamp(current.images_NCHW + length_NC11 * current.gradient_NCHW.sign(), ball)
            if step > 1:
                momentum = (1 - _MOMENTUM) * (current.images_NCHW - previous_NCHW)
                ahead = _clamp(current.images_NCHW + _MOMENTUM * (ahead - current.images_NCHW) + momentum, ball)
            previous_NCHW, previous_loss_N = current.images_NCHW, current.loss_N
            current = evaluate(ahead)
            increases_N += current.loss_N > previous_loss_N
            best = best.updated(current.loss_N > best.loss_N, current)
            stronger_N = (current.fooled_N & ~strongest.fooled_N) | (
                (current.fooled_N == strongest.fooled_N) & (current.loss_N > strongest.loss_N)
            )
            strongest = strongest.updated(stronger_N, current)
            if step in checks:
                stuck_N = increases_N < _PROGRESS * (step - last_check)
                stuck_N |= ~halved_N & (checked_loss_N == best.loss_N)
                step_N = torch.where(stuck_N, step_N / 2, step_N)
                current = current.updated(stuck_N, best)
                last_check, halved_N, checked_loss_N = step, stuck_N, best.loss_N
                increases_N = torch.zeros_like(increases_N)
        return strongest.images_NCHW

    def _evaluate(self, model: nn.Module, images_NCHW: torch.Tensor, labels_N: torch.Tensor) -> _Point:
        images_NCHW = images_NCHW.detach().requires_grad_(True)
        with torch.enable_grad():
            logits_NK = model(images_NCHW).float()
            loss_N = self._loss(logits_NK, labels_N)
            # The scale keeps small gradients from vanishing; only their signs are used.
            (gradient,) = torch.autograd.grad(loss_N.sum() * LOSS_SCALE, images_NCHW)
        fooled_N = logits_NK.detach().argmax(1) != labels_N
        return _Point(images_NCHW.detach(), loss_N.detach(), gradient, fooled_N)


def _clamp(images_NCHW: torch.Tensor, ball: Ball) -> torch.Tensor:
    return torch.clamp(images_NCHW, ball.lowest, ball.highest)
