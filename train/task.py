"""`AdvPropTask`: one training step of any recipe, as a timm training task.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.task import ClassificationTask
from timm.utils.model import unwrap_model
from torch import nn

from train.attack import LinfPGD
from train.config import AttackConfig
from train.dual_bn import add_auxiliary_bns, find_router, route
from train.recipes import Branch, Recipe, auxiliary_routes

__all__ = ["AdvPropTask"]


class AdvPropTask(ClassificationTask):  # type: ignore[misc]  # timm's classes are untyped
    """Clean and adversarial images in one step, each through its own BatchNorm.

    `forward` returns the sum of the branches' losses. All branches go through the network
    in one joint forward, split only at the BatchNorms, so the step needs one backward and
    works under DistributedDataParallel.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        attack: AttackConfig,
        mean: Sequence[float],
        std: Sequence[float],
        criterion: nn.Module | Callable[..., torch.Tensor] | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            model: a timm model. Auxiliary BNs that the recipe needs are added where missing.
            recipe: one of `train.recipes.RECIPES`, or your own list of branches.
            attack: the training attack.
            mean: per-channel mean the images are normalised with, of pixels in [0, 1].
            std: per-channel standard deviation likewise.
            criterion: loss of (logits, labels); default: timm's cross entropy.
            criterion_kwargs: arguments of timm's cross entropy, e.g. {"smoothing": 0.1}.
            device: of criterion and model.

        Raises:
            ArchError: the recipe needs auxiliary BNs and the model has no BatchNorm.
        """
        routes = auxiliary_routes(recipe)
        if routes and find_router(model) is None:
            add_auxiliary_bns(model, routes)
        super().__init__(model, criterion, criterion_kwargs, device=device, verbose=False)
        self.recipe = recipe
        self.attack = LinfPGD(attack, mean, std)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Computes the loss of one step.

        Args:
            input: normalised images, (N, C, H, W).
            target: int64 labels, (N,).

        Returns:
            `loss`: what to minimise; `output`: logits of the first branch, (N, K);
            `loss/NAME`: mean loss of each branch, detached.
        """
        counts = [max(1, round(branch.share * input.shape[0])) for branch in self.recipe]
        parts = [
            self._images(branch, input[:count], target[:count])
            for branch, count in zip(self.recipe, counts, strict=True)
        ]
        with route(self.trainable_module, *_merged(self.recipe, counts)):
            logits = self.trainable_module(torch.cat(parts) if len(parts) > 1 else parts[0])
        result: dict[str, torch.Tensor] = {}
        total = torch.zeros((), device=input.device)
        for branch, count, logits_NK in zip(self.recipe, counts, logits.split(counts), strict=True):
            loss = self.criterion(logits_NK, target[:count])
            total = total + branch.weight * loss
            result.setdefault("output", logits_NK)
            result[f"loss/{branch.name}"] = loss.detach()
        return {"loss": total, **result}

    def _images(self, branch: Branch, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if branch.source == "clean":
            return images
        # The bare model: the attack needs no gradient synchronisation.
        return self.attack(unwrap_model(self.trainable_module), images, labels, branch.bn)


def _merged(recipe: Recipe, counts: Sequence[int]) -> list[tuple[str, int]]:
    """Neighbouring branches on one route share its batch statistics."""
    plan: list[tuple[str, int]] = []
    for branch, count in zip(recipe, counts, strict=True):
        if plan and plan[-1][0] == branch.bn:
            plan[-1] = (branch.bn, plan[-1][1] + count)
        else:
            plan.append((branch.bn, count))
    return plan
