"""`AdvPropTask`: one training step of any recipe, as a timm training task.

Shape suffixes: N images, V views, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.task import ClassificationTask
from timm.utils.model import unwrap_model
from torch import nn

from runtime.errors import ConfigError
from train.attack import LOSS_SCALE, LinfPGD, Randomness
from train.config import AttackConfig
from train.distributed import shuffled_across_processes
from train.dual_bn import RoutedBatchNorm, add_auxiliary_bns, find_router, route, statistics_kept
from train.recipes import MAIN, Branch, Recipe

__all__ = ["AdvPropTask"]


class AdvPropTask(ClassificationTask):  # type: ignore[misc]  # timm's classes are untyped
    """Clean and adversarial images in one step, each through its own BatchNorm.

    `forward` returns the weighted sum of the branches' losses. All branches go through the
    network in one joint forward, split only at the BatchNorms, so the step needs one
    backward and works under DistributedDataParallel.
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
        mixup: Mixup | None = None,
        amp_dtype: torch.dtype | None = None,
        randomness: Randomness | None = None,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            model: a timm model without activation checkpointing. The auxiliary BNs that the
                recipe needs are added, unless it has them.
            recipe: one of `train.recipes.RECIPES`, or branches of your own.
            attack: the training attack.
            mean: per-channel mean the images are normalized with, of pixels in [0, 1].
            std: per-channel standard deviation likewise.
            criterion: loss of (logits, labels); default: timm's cross entropy.
            criterion_kwargs: arguments of timm's cross entropy, e.g. {"smoothing": 0.1}.
            mixup: timm's mixup or cutmix, for the clean branch only.
            amp_dtype: bfloat16 or float16 to run attack and step under autocast.
            randomness: what the attack draws; default: torch's generator.
            device: of criterion and model.

        Raises:
            ArchError: the recipe needs auxiliary BNs and the model has no BatchNorm.
        """
        router = find_router(model)
        if router is None and recipe.auxiliary_routes:
            add_auxiliary_bns(model, recipe.auxiliary_routes)
        elif router is not None and set(recipe.auxiliary_routes) - set(router.auxiliary):
            raise ConfigError(
                f"the model has the auxiliary routes {', '.join(router.auxiliary)}, the recipe needs "
                f"{', '.join(recipe.auxiliary_routes)}; start from a model without them"
            )
        if any(getattr(module, "grad_checkpointing", False) for module in model.modules()):
            raise ConfigError(
                "activation checkpointing recomputes layers after the BatchNorm route has changed back; "
                "switch it off: model.set_grad_checkpointing(False)"
            )
        super().__init__(model, criterion, criterion_kwargs, device=device, verbose=False)
        self.recipe = recipe
        self.attack = LinfPGD(attack, mean, std, randomness)
        self.mixup = mixup
        self.amp_dtype = amp_dtype
        self.soft_criterion = SoftTargetCrossEntropy()
        self._speed = _synchronize(model, recipe) if recipe.synchronize else {}

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Computes the loss of one step.

        Args:
            input: normalized images, (N, C, H, W); (N, V, C, H, W) for a recipe with an
                AutoAugment branch, whose images are view 1.
            target: int64 labels, (N,).

        Returns:
            `loss`: what to minimize; `output`: logits of the first branch, (N, K);
            `loss/NAME`: mean loss of each branch, detached.

        Raises:
            ConfigError: the batch is too small for the recipe's smallest branch.
        """
        with self._autocast():
            return self._losses(input, target)

    def _losses(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        result: dict[str, torch.Tensor] = {}
        total = torch.zeros((), device=input.device)
        parts, targets = [], []
        for branch in self.recipe.branches:
            first, last = round(branch.start * len(target)), round(branch.end * len(target))
            if last - first < 2:
                raise ConfigError(
                    f"the branch {branch.name} gets {last - first} of {len(target)} images, and BatchNorm needs two; "
                    "use a larger --batch-size"
                )
            images, labels = input[first:last], target[first:last]
            if branch.source == "reused-gradient":
                images, noise_loss = self._noise_pass(branch, images, labels)
                total = total + noise_loss
                result[f"loss/{branch.name}-noise"] = noise_loss.detach() / branch.weight
            else:
                images, labels = self._images(branch, images, labels)
            if self.recipe.shuffle and branch.source in ("pgd", "reused-gradient"):
                images, labels = shuffled_across_processes(images, labels)
            parts.append(images)
            targets.append(labels)
        counts = [len(part) for part in parts]
        with route(self.trainable_module, *_merged(self.recipe, counts)):
            logits = self.trainable_module(torch.cat(parts) if len(parts) > 1 else parts[0])
        for branch, labels, logits_NK in zip(self.recipe.branches, targets, logits.split(counts), strict=True):
            loss = (self.soft_criterion if labels.is_floating_point() else self.criterion)(logits_NK, labels)
            total = total + branch.weight * loss
            result.setdefault("output", logits_NK)
            result[f"loss/{branch.name}"] = loss.detach()
        return {"loss": total, **result}

    def _images(self, branch: Branch, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The branch's images, and its labels (soft ones after mixup)."""
        if branch.source == "autoaugment":
            return images[:, 1], labels
        if images.ndim == 5:
            images = images[:, 0]
        if branch.source == "clean":
            return self.mixup(images.clone(), labels) if self.mixup is not None else (images, labels)
        # The bare model: the attack needs no gradient synchronization.
        return self.attack(self._bare(), images, labels, branch.bn), labels

    def _noise_pass(
        self, branch: Branch, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass over noisy images gives the adversarial images and a training gradient.

        Batch statistics, as published (running ones diverged with reuse); the running
        statistics are left to the adversarial pass, so that a step moves them once.

        Returns:
            The adversarial images, and the noise loss times the branch's weight, whose
            backward adds the gradient that is already known.
        """
        model = self._bare()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ball = self.attack.ball(images)
        noisy = self.attack.start(ball).requires_grad_(True)
        scale = LOSS_SCALE if self.amp_dtype == torch.float16 else 1.0
        with statistics_kept(model), route(model, branch.bn):
            loss = branch.weight * self.criterion(model(noisy), labels)
        gradients = torch.autograd.grad(loss * scale, [noisy, *parameters], allow_unused=True)
        attacked = self.attack.step(ball, noisy.detach(), gradients[0])
        known = {p: gradient for p, gradient in zip(parameters, gradients[1:], strict=True) if gradient is not None}
        if scale != 1:
            torch._foreach_div_(list(known.values()), scale)
        for parameter, gradient in known.items():
            if parameter in self._speed:  # its hook has run, and will run again in the backward
                gradient.div_(self._speed[parameter])
        reused: torch.Tensor = _KnownGradient.apply(loss.detach(), list(known.values()), *known)
        return attacked, reused

    def _bare(self) -> nn.Module:
        model: nn.Module = unwrap_model(self.trainable_module)
        return model

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.amp_dtype is None else torch.autocast(self.device.type, self.amp_dtype)


class _KnownGradient(torch.autograd.Function):
    """A loss whose gradients with respect to the parameters are known already."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, gradients: list[torch.Tensor], *_: nn.Parameter) -> torch.Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *factor: torch.Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        # On a CPU the factor can be looked at without waiting, and is 1 unless losses are scaled.
        if factor[0].device.type != "cpu" or factor[0].item() != 1:
            torch._foreach_mul_(gradients, factor[0])
        return None, None, *gradients


def _synchronize(model: nn.Module, recipe: Recipe) -> dict[nn.Parameter, float]:
    """Scales the gradients of each route's BatchNorms to the speed of the shared weights."""
    total = sum(recipe.route_weight(bn) for bn in (MAIN, *recipe.auxiliary_routes))
    speeds: dict[nn.Parameter, float] = {}
    for layer in model.modules():
        if not isinstance(layer, RoutedBatchNorm):
            continue
        routes = {MAIN: layer, **{name: layer.aux[name] for name in recipe.auxiliary_routes}}
        for bn, module in routes.items():
            assert isinstance(module, nn.Module)
            for parameter in module.parameters(recurse=False):
                speeds[parameter] = total / recipe.route_weight(bn)
    for parameter, speed in speeds.items():
        parameter.register_hook(lambda gradient, speed=speed: gradient * speed)  # type: ignore[no-untyped-call]
    return speeds


def _merged(recipe: Recipe, counts: Sequence[int]) -> list[tuple[str, int]]:
    """Neighboring branches on one route share its batch statistics."""
    plan: list[tuple[str, int]] = []
    for branch, count in zip(recipe.branches, counts, strict=True):
        if plan and plan[-1][0] == branch.bn:
            plan[-1] = (branch.bn, plan[-1][1] + count)
        else:
            plan.append((branch.bn, count))
    return plan
