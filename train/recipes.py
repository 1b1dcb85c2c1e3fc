"""Recipes as data: which images go through which BatchNorm, and with which weight.

A recipe is a list of branches. A new method needs a new list, not a new trainer.

    vanilla       clean → main
    finetune      clean → main, from a checkpoint: the slides' second stage after `adversarial`
    adversarial   PGD → main                   adversarial training (Madry et al., 2018)
    shared-bn     clean → main + PGD → main    the ablation without a second BN
    advprop       clean → main + PGD → adv     Algorithm 1 of "Adversarial Examples Improve
                                               Image Recognition", CVPR 2020
    shared-statistics
                  the same with common batch statistics and separate affine parameters
                                               (Zhang et al., arXiv 2403.19150)
    fine-grained  clean → main + AutoAugment → aug + PGD → adv
                                               the slides' Fine-Grained AdvProp
    fast          80% clean → main; 20% with noise → adv. Its gradient updates the weights and
                  creates the adversarial images → adv
                                               Fast AdvProp (Mei et al., ICLR 2022)

Cost of an epoch in passes, relative to vanilla, with K attack steps: advprop, shared-statistics and
shared-bn (2K + 6) / 3, fine-grained (2K + 9) / 3, adversarial (2K + 3) / 3, fast 1.2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from runtime.errors import ConfigError, nearest

__all__ = ["MAIN", "RECIPES", "Branch", "Recipe", "find_recipe"]

MAIN = "main"
"""The BatchNorm route for inference, which has the plain state-dict keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One data distribution of a training step."""

    name: str
    """Name of the branch's loss in logs."""
    source: Literal["clean", "autoaugment", "pgd", "reused-gradient"]
    """Source of the images: the batch as loaded, its AutoAugment view, PGD on the batch through
    this branch's `bn`, or a one-step attack whose noise pass is also a training pass."""
    bn: str
    """BatchNorm route: `main`, or the name of an auxiliary one."""
    weight: float = 1.0
    """Factor of this branch's mean loss in the total loss."""
    start: float = 0.0
    """Start of this branch's part of the batch, as a share of the batch."""
    end: float = 1.0
    """End of this branch's part of the batch, as a share of the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The branches of a training step and the settings that belong to them."""

    branches: tuple[Branch, ...]
    """Data distributions, whose losses are added."""
    share_statistics: bool = False
    """Normalize all branches of a batch together, with one set of running statistics. The routes
    differ in their affine parameters only."""
    synchronize: bool = False
    """Scale the gradients of each route's BatchNorms by the inverse of the route's total weight, so
    they learn as fast as the shared weights ("synchronizing parameter updating speed" of Fast
    AdvProp)."""
    shuffle: bool = False
    """Shuffle adversarial images across processes, so batch statistics do not reveal which images
    were attacked together (Fast AdvProp)."""
    from_checkpoint: bool = False
    """The recipe requires the weights of another run to start from."""
    attack: dict[str, float | int | bool] = field(default_factory=dict)
    """Attack settings of the recipe; settings of the user replace them."""

    @property
    def auxiliary_routes(self) -> tuple[str, ...]:
        """The auxiliary BN routes, in order, without duplicates."""
        return tuple(dict.fromkeys(branch.bn for branch in self.branches if branch.bn != MAIN))

    @property
    def views(self) -> int:
        """Views of each image that the loader must provide: 2 with an AutoAugment branch."""
        return 2 if any(branch.source == "autoaugment" for branch in self.branches) else 1

    def route_weight(self, bn: str) -> float:
        """Return the sum of the weights on route `bn`; a reused gradient counts twice."""
        return sum(
            branch.weight * (2 if branch.source == "reused-gradient" else 1)
            for branch in self.branches
            if branch.bn == bn
        )


_CLEAN = Branch(name="clean", source="clean", bn=MAIN)
_ADV_ON_MAIN = Branch(name="adv", source="pgd", bn=MAIN)
_ADV = Branch(name="adv", source="pgd", bn="adv")

RECIPES: dict[str, Recipe] = {
    "vanilla": Recipe(branches=(_CLEAN,)),
    "finetune": Recipe(branches=(_CLEAN,), from_checkpoint=True),
    "adversarial": Recipe(branches=(_ADV_ON_MAIN,)),
    "shared-bn": Recipe(branches=(_CLEAN, _ADV_ON_MAIN)),
    "advprop": Recipe(branches=(_CLEAN, _ADV)),
    "shared-statistics": Recipe(branches=(_CLEAN, _ADV), share_statistics=True),
    "fine-grained": Recipe(branches=(_CLEAN, Branch(name="aug", source="autoaugment", bn="aug"), _ADV)),
    # Published as one mean over all images, with 4 clean images per adversarial one and weights of
    # 0.5 for noise and adversarial loss: 0.8, 0.1 and 0.1 of the means of the branches.
    "fast": Recipe(
        branches=(
            Branch(name="clean", source="clean", bn=MAIN, weight=0.8, end=0.8),
            Branch(name="adv", source="reused-gradient", bn="adv", weight=0.1, start=0.8),
        ),
        synchronize=True,
        shuffle=True,
        attack={"epsilon": 1.0, "steps": 1, "targeted": False, "clean_start_share": 0.0},
    ),
}


def find_recipe(name: str) -> Recipe:
    """Return the recipe called `name`.

    Raises:
        ConfigError: there is no such recipe; the message lists the available names.
    """
    if name not in RECIPES:
        raise ConfigError(
            f"unknown recipe {name!r}; available: {', '.join(RECIPES)}; {nearest(name, RECIPES)}".rstrip("; ")
        )
    return RECIPES[name]
