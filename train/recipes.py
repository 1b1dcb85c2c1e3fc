"""Recipes as data: which images go through which BatchNorm, with which weight.

A recipe is a list of branches; a new idea is a new list, not a new trainer.

    vanilla       clean → main
    adversarial   PGD → main                   adversarial training (Madry et al.)
    shared-bn     clean → main + PGD → main    the ablation without a second BN
    advprop       clean → main + PGD → adv     Algorithm 1 of "Adversarial Examples Improve
                                               Image Recognition", CVPR 2020
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from runtime.errors import ConfigError, nearest

__all__ = ["MAIN", "RECIPES", "Branch", "Recipe", "auxiliary_routes", "find_recipe"]

MAIN = "main"
"""The BatchNorm route of inference: the one with the plain state-dict keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One data distribution of a training step."""

    name: str
    """Names the branch's loss in the metrics."""
    source: Literal["clean", "pgd"]
    """What makes the images: the batch as loaded, or PGD on it through this branch's `bn`."""
    bn: str
    """BatchNorm route: `main`, or the name of an auxiliary one."""
    weight: float = 1.0
    """Factor of this branch's mean loss in the sum that is minimised."""
    share: float = 1.0
    """Share of the batch that this branch sees, from its front."""


Recipe: TypeAlias = tuple[Branch, ...]

_CLEAN = Branch(name="clean", source="clean", bn=MAIN)

RECIPES: dict[str, Recipe] = {
    "vanilla": (_CLEAN,),
    "adversarial": (Branch(name="adv", source="pgd", bn=MAIN),),
    "shared-bn": (_CLEAN, Branch(name="adv", source="pgd", bn=MAIN)),
    "advprop": (_CLEAN, Branch(name="adv", source="pgd", bn="adv")),
}


def find_recipe(name: str) -> Recipe:
    """Returns the recipe called `name`. Raises ConfigError, with the names there are."""
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}. {nearest(name, RECIPES)}".rstrip())
    return RECIPES[name]


def auxiliary_routes(recipe: Recipe) -> tuple[str, ...]:
    """Returns the auxiliary BN routes that `recipe` uses, in order, each once."""
    return tuple(dict.fromkeys(branch.bn for branch in recipe if branch.bn != MAIN))
