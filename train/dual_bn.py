"""Routed BatchNorm: one set of statistics and affine parameters for each data distribution.

The routed layer is the original layer plus a ModuleDict `aux` with a copy of it for each
auxiliary route. The main route keeps the plain state-dict keys (`bn1.weight`), auxiliary
ones have `.aux.` in theirs (`bn1.aux.adv.weight`), so stripping a checkpoint is dropping
keys, and what remains loads into the stock timm model.

Tensor shapes: N images first, whatever follows.
"""

from __future__ import annotations

import copy
import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from runtime.errors import ArchError, ConfigError
from train.distributed import unsynchronized
from train.joint_norm import affine_map, applies, is_constant, is_plain, normalize_parts
from train.recipes import MAIN

__all__ = [
    "RoutedBatchNorm",
    "Router",
    "add_auxiliary_bns",
    "auxiliary_routes",
    "find_router",
    "route",
    "select_route",
    "statistics_kept",
    "strip_auxiliary",
]

_AUX_KEY = re.compile(r"\.(?:aux\.([^.]+)|(aux_bn(?:\.\d+)?))\.")
"""What every auxiliary state-dict key contains and no other key does: `.aux.NAME.` where we
wrote it, `.aux_bn.0.` in timm's split BatchNorms, `.aux_bn.` in other AdvProp code."""

_Value = TypeVar("_Value")


class Router:
    """The route that batches take now. All routed layers of a model share one."""

    def __init__(self, auxiliary: Sequence[str]) -> None:
        self.auxiliary = tuple(auxiliary)
        self.plan: tuple[tuple[str, int], ...] = ((MAIN, 1),)
        """(route, images) for consecutive parts of the batch. With one part the count is
        not used; with several they are in proportion where a layer folds other
        dimensions into the first."""


class RoutedBatchNorm:
    """Mixin that makes a BatchNorm class choose its statistics by route.

    Works on nn.BatchNorm*, nn.SyncBatchNorm and timm's BatchNormAct2d, whose activation
    and drop layers are kept: each route is a whole layer of the original class.
    """

    router: Router
    aux: nn.ModuleDict
    plain: bool
    """Whether the original class is a BatchNorm like torch's."""
    plain_in_eval: bool
    """The same for evaluation, where nothing is synchronized."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self.router.plan
        if len(plan) == 1:
            return self._through(plan[0][0], x)
        total = sum(count for _, count in plan)
        if x.shape[0] % total:
            raise ValueError(f"a batch of {x.shape[0]} cannot be routed as {plan}")
        counts = [count * (x.shape[0] // total) for _, count in plan]
        layers = [self._layer(name) for name, _ in plan]
        if self.plain and applies(layers, counts, x):
            return normalize_parts(layers, counts, x)
        parts = torch.split(x, counts)
        return torch.cat([self._through(name, part) for (name, _), part in zip(plan, parts, strict=True)])

    def _layer(self, name: str) -> nn.Module:
        return cast(nn.Module, self if name == MAIN else self.aux[name])

    def _through(self, name: str, x: torch.Tensor) -> torch.Tensor:
        layer = self._layer(name)
        if self.plain_in_eval and is_constant(layer, x):
            return affine_map(layer, x)
        if name == MAIN:
            return cast(torch.Tensor, super().forward(x))  # type: ignore[misc]
        return cast(torch.Tensor, layer(x))


@functools.cache
def _routed_class(original: type[nn.Module]) -> type[nn.Module]:
    kinds = {
        "plain": is_plain(original),
        "plain_in_eval": is_plain(unsynchronized(original)),
    }
    return type(f"Routed{original.__name__}", (RoutedBatchNorm, original), kinds)


def add_auxiliary_bns(model: nn.Module, routes: Sequence[str]) -> nn.Module:
    """Gives every BatchNorm of `model` an auxiliary copy for each of `routes`, in place.

    The copies start from the main layer's parameters and statistics. The main route's
    output stays bit-equal to that of the unconverted model.

    Args:
        model: any model with BatchNorm layers, not converted yet.
        routes: names of the auxiliary routes, e.g. ("adv",).

    Returns:
        `model`, on route `main`.

    Raises:
        ArchError: the model has no BatchNorm; the message says which norms it has.
        ConfigError: a name that cannot be a route, or a model that is converted already.
    """
    for name in routes:
        if name == MAIN or not name.isidentifier():
            raise ConfigError(f"an auxiliary route needs a plain name other than {MAIN!r}; found {name!r}")
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if any(isinstance(layer, RoutedBatchNorm) for layer in layers):
        raise ConfigError("the model has auxiliary BatchNorms already")
    if not layers:
        raise ArchError(_no_batchnorm(model))
    router = Router(routes)
    for layer in layers:
        copies = {name: copy.deepcopy(layer) for name in routes}
        routed = cast(Any, layer)
        routed.__class__ = _routed_class(routed.__class__)
        routed.router = router
        routed.aux = nn.ModuleDict(copies)
    return model


def _no_batchnorm(model: nn.Module) -> str:
    kinds = (type(module).__name__ for module in model.modules() if not any(module.children()))
    norms = Counter(kind for kind in kinds if "Norm" in kind)
    found = ", ".join(f"{count} {name}" for name, count in norms.most_common()) or "no normalization layer"
    name = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
    return (
        f"{name} has no BatchNorm: it has {found}. AdvProp keeps adversarial statistics apart in a second "
        "BatchNorm, so it needs an architecture with BatchNorm (efficientnet_b0, resnet50, regnety_016, "
        "mobilenetv3_large_100, …). This one can be trained with --recipe vanilla, adversarial or shared-bn"
    )


def find_router(model: nn.Module) -> Router | None:
    """Returns the router of `model` (wrapped by DDP or torch.compile or not), or None."""
    for module in model.modules():
        if isinstance(module, RoutedBatchNorm):
            return module.router
    return None


@contextmanager
def route(model: nn.Module, *plan: str | tuple[str, int]) -> Iterator[None]:
    """Sends batches through the given BatchNorm route while the context lasts.

    Args:
        model: a model; one without auxiliary BNs knows the route `main` only.
        plan: one route name, or (name, images) pairs for consecutive parts of a batch.

    Raises:
        ConfigError: the model has no such route.
    """
    pairs = tuple((part, 1) if isinstance(part, str) else part for part in plan)
    router = find_router(model)
    known = (MAIN, *router.auxiliary) if router else (MAIN,)
    for name, _ in pairs:
        if name not in known:
            raise ConfigError(f"the model has no BatchNorm route {name!r}; it has {', '.join(known)}")
    if router is None:
        yield
        return
    before, router.plan = router.plan, pairs
    try:
        yield
    finally:
        router.plan = before


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """BatchNorms in training mode use batch statistics but do not update the running ones."""
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def strip_auxiliary(state_dict: Mapping[str, _Value]) -> dict[str, _Value]:
    """Returns `state_dict` without the auxiliary BatchNorms: the stock model's keys."""
    return {key: value for key, value in state_dict.items() if _route_of(key) == MAIN}


def select_route(state_dict: Mapping[str, _Value], name: str) -> dict[str, _Value]:
    """Returns `state_dict` with the BatchNorms of route `name` under the stock model's keys.

    Raises:
        ConfigError: it has no such route.
    """
    known = (MAIN, *auxiliary_routes(state_dict))
    if name not in known:
        raise ConfigError(f"there is no BatchNorm route {name!r}; there are {', '.join(known)}")
    selected = strip_auxiliary(state_dict)
    if name != MAIN:
        selected |= {_AUX_KEY.sub(".", key): value for key, value in state_dict.items() if _route_of(key) == name}
    return selected


def auxiliary_routes(state_dict: Mapping[str, object]) -> tuple[str, ...]:
    """Returns the names of the auxiliary routes that a state dict has, in its order."""
    return tuple(name for name in dict.fromkeys(map(_route_of, state_dict)) if name != MAIN)


def _route_of(key: str) -> str:
    match = _AUX_KEY.search(key)
    return MAIN if match is None else match[1] or match[2]
