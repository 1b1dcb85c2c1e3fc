"""`AdvPropTask`: one training step of any recipe, as a timm training task.

Shape suffixes: N images, V views, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from timm.task import ClassificationTask
from timm.utils.model import unwrap_model
from torch import nn

from runtime.errors import ConfigError
from train.attack import LOSS_SCALE, LinfPGD, at_least_float32
from train.distributed import shuffled_across_processes
from train.dual_bn import RoutedBatchNorm, add_auxiliary_bns, find_router, frozen_statistics, route
from train.recipes import MAIN, Branch, Recipe

__all__ = ["AdvPropTask"]


class AdvPropTask(ClassificationTask):  # type: ignore[misc]  # timm's classes are untyped
    """Trains on clean and adversarial images in one step, each through its own BatchNorms.

    `forward` returns the weighted sum of the branches' losses. All branches go through the network
    in one joint forward pass that is split only at the BatchNorms, so a step needs one backward
    pass and works under DistributedDataParallel.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        attack: LinfPGD,
        *,
        criterion: nn.Module | Callable[..., torch.Tensor] | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        mixup: Mixup | None = None,
        amp_dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            model: a timm model without activation checkpointing. The auxiliary BNs of the recipe
                are added, unless the model already has them.
            recipe: one of `train.recipes.RECIPES`, or branches of your own.
            attack: the training attack.
            criterion: loss of (logits, labels) (default: timm's cross-entropy). The class weights
                of a torch CrossEntropyLoss also apply to the soft labels of mixup.
            criterion_kwargs: arguments of timm's cross-entropy, e.g. {"smoothing": 0.1}.
            mixup: timm's mixup or cutmix, applied to the clean branch only.
            amp_dtype: bfloat16 or float16 to run attack and step under autocast.
            device: device of criterion and model.

        Raises:
            ArchError: the recipe needs auxiliary BNs and the model has no BatchNorm.
            ConfigError: the model has other auxiliary BNs, or shares their statistics unlike the
                recipe, or uses activation checkpointing.
        """
        router = find_router(model)
        if router is None and recipe.auxiliary_routes:
            add_auxiliary_bns(model, recipe.auxiliary_routes, share_statistics=recipe.share_statistics)
        elif router is not None and set(recipe.auxiliary_routes) - set(router.auxiliary):
            raise ConfigError(
                f"the model has the auxiliary routes {', '.join(router.auxiliary)}, but the recipe needs "
                f"{', '.join(recipe.auxiliary_routes)}; start from a model without auxiliary routes"
            )
        elif router is not None and recipe.auxiliary_routes and router.share_statistics != recipe.share_statistics:
            raise ConfigError(
                f"the routes of the model {_statistics(router.share_statistics)}, but the recipe needs routes that "
                f"{_statistics(recipe.share_statistics)}; start from a model without auxiliary routes"
            )
        if any(getattr(module, "grad_checkpointing", False) for module in model.modules()):
            raise ConfigError(
                "activation checkpointing recomputes layers after the BatchNorm route has changed back; "
                "switch it off: model.set_grad_checkpointing(False)"
            )
        super().__init__(model, criterion, criterion_kwargs, device=device, verbose=False)
        self.recipe = recipe
        self.attack = attack
        self.mixup = mixup
        self.amp_dtype = amp_dtype
        self.soft_criterion = SoftTargetCrossEntropy()
        if isinstance(criterion, nn.CrossEntropyLoss) and criterion.weight is not None:
            self.soft_criterion = nn.CrossEntropyLoss(criterion.weight)
        self._gradient_scales = _scale_route_gradients(model, recipe) if recipe.synchronize else {}

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the loss of one step.

        Args:
            input: normalized images, (N, C, H, W). Recipes with an AutoAugment branch need
                (N, V, C, H, W) with the AutoAugment images in view 1.
            target: int64 labels, (N,).

        Returns:
            `loss`: the value to minimize; `output`: logits of the first branch, (N, K);
            `loss/NAME`: mean loss of each branch, detached.

        Raises:
            ConfigError: the batch is too small for the smallest branch of the recipe.
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
                    f"the branch {branch.name} gets {last - first} of {len(target)} images, but BatchNorm needs at "
                    "least two; use a larger --batch-size"
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
        with route(self.trainable_module, *_route_plan(self.recipe, counts)):
            logits = at_least_float32(self.trainable_module(torch.cat(parts) if len(parts) > 1 else parts[0]))
        for branch, labels, logits_NK in zip(self.recipe.branches, targets, torch.split(logits, counts), strict=True):
            loss = (self.soft_criterion if labels.is_floating_point() else self.criterion)(logits_NK, labels)
            total = total + branch.weight * loss
            result.setdefault("output", logits_NK)
            result[f"loss/{branch.name}"] = loss.detach()
        return {"loss": total, **result}

    def _images(self, branch: Branch, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the images of the branch, and their labels (soft ones after mixup)."""
        if branch.source == "autoaugment":
            return images[:, 1], labels
        if images.ndim == 5:
            images = images[:, 0]
        if branch.source == "clean":
            return self._mixed(images, labels) if self.mixup is not None else (images, labels)
        # The attack runs on the unwrapped model because it needs no gradient synchronization.
        return self.attack(self._unwrapped(), images, labels, branch.bn), labels

    def _mixed(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mixed images and soft labels. The last image of an odd number is not mixed.

        timm mixes an even number of images only.
        """
        assert self.mixup is not None
        even = len(images) // 2 * 2
        mixed, soft = self.mixup(images[:even].clone(), labels[:even])
        if even == len(images):
            return mixed, soft
        rest = mixup_target(labels[even:], self.mixup.num_classes, 1.0, self.mixup.label_smoothing)
        return torch.cat([mixed, images[even:]]), torch.cat([soft, rest])

    def _noise_pass(
        self, branch: Branch, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute adversarial images and a training gradient in one pass over noisy images.

        It uses batch statistics, as published (running statistics diverged when the gradient was
        reused). Only the adversarial pass updates the running statistics, once per step.

        Returns:
            The adversarial images, and the noise loss times the branch's weight. The backward pass
            of this loss adds the gradient that is already known.
        """
        model = self._unwrapped()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ball = self.attack.ball(images)
        noisy = self.attack.start(ball).requires_grad_(True)
        scale = LOSS_SCALE if self.amp_dtype == torch.float16 else 1.0
        with frozen_statistics(model), route(model, branch.bn):
            loss = branch.weight * self.criterion(at_least_float32(model(noisy)), labels)
        gradients = torch.autograd.grad(loss * scale, [noisy, *parameters], allow_unused=True)
        attacked = self.attack.step(ball, noisy.detach(), gradients[0])
        known = {p: gradient for p, gradient in zip(parameters, gradients[1:], strict=True) if gradient is not None}
        if scale != 1:
            torch._foreach_div_(list(known.values()), scale)
        for parameter, gradient in known.items():
            if parameter in self._gradient_scales:  # its hook has run here, and runs again in the backward pass
                gradient.div_(self._gradient_scales[parameter])
        reused: torch.Tensor = _KnownGradient.apply(loss.detach(), list(known.values()), *known)
        return attacked, reused

    def _unwrapped(self) -> nn.Module:
        model: nn.Module = unwrap_model(self.trainable_module)
        return model

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.amp_dtype is None else torch.autocast(self.device.type, self.amp_dtype)


class _KnownGradient(torch.autograd.Function):
    """A loss whose gradients with respect to the parameters are already known."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, gradients: list[torch.Tensor], *_: nn.Parameter) -> torch.Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *factor: torch.Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        # The factor is 1 unless losses are scaled. Reading it is free on a CPU; on a GPU it waits.
        if factor[0].device.type != "cpu" or factor[0].item() != 1:
            torch._foreach_mul_(gradients, factor[0])
        return None, None, *gradients


def _scale_route_gradients(model: nn.Module, recipe: Recipe) -> dict[nn.Parameter, float]:
    """Scale the gradients of each route's BatchNorms so they learn as fast as the shared weights.

    Returns:
        The factor of each parameter; a hook applies it.
    """
    total = sum(recipe.route_weight(bn) for bn in (MAIN, *recipe.auxiliary_routes))
    scales: dict[nn.Parameter, float] = {}
    for layer in model.modules():
        if not isinstance(layer, RoutedBatchNorm):
            continue
        routes = {MAIN: layer, **{name: layer.aux[name] for name in recipe.auxiliary_routes}}
        for bn, module in routes.items():
            assert isinstance(module, nn.Module)
            for parameter in module.parameters(recurse=False):
                scales[parameter] = total / recipe.route_weight(bn)
    for parameter, scale in scales.items():
        parameter.register_hook(lambda gradient, scale=scale: gradient * scale)  # type: ignore[no-untyped-call]
    return scales


def _statistics(shared: bool) -> str:
    return "share their statistics" if shared else "have separate statistics"


def _route_plan(recipe: Recipe, counts: Sequence[int]) -> list[tuple[str, int]]:
    """Return (route, images) pairs; adjacent branches on one route share batch statistics."""
    plan: list[tuple[str, int]] = []
    for branch, count in zip(recipe.branches, counts, strict=True):
        if plan and plan[-1][0] == branch.bn:
            plan[-1] = (branch.bn, plan[-1][1] + count)
        else:
            plan.append((branch.bn, count))
    return plan
