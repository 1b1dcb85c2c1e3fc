"""Routed BatchNorm: separate statistics and affine parameters for each data distribution.

A routed layer is the original layer plus a ModuleDict `aux` with one copy of it for each auxiliary
route, or only with affine parameters if the routes share their statistics. The main route keeps the
plain state-dict keys (`bn1.weight`); keys of auxiliary routes contain `.aux.`
(`bn1.aux.adv.weight`). Removing those keys leaves a state dict that loads into the stock timm model.

The first dimension of every tensor indexes images; the other dimensions are arbitrary.
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
from train.joint_norm import affine_map, can_normalize_parts, can_use_affine_map, is_plain, normalize_parts
from train.recipes import MAIN
from train.shared_norm import Affine, normalize_together

__all__ = [
    "RoutedBatchNorm",
    "Router",
    "add_auxiliary_bns",
    "auxiliary_routes",
    "find_router",
    "frozen_statistics",
    "route",
    "select_route",
    "shares_statistics",
    "strip_auxiliary",
]

_AUX_KEY = re.compile(r"\.(?:aux\.([^.]+)|(aux_bn(?:\.\d+)?))\.")
"""Matches auxiliary state-dict keys only: `.aux.NAME.` in advprop's checkpoints, `.aux_bn.0.` in
timm's split BatchNorms, `.aux_bn.` in other AdvProp code."""

_Value = TypeVar("_Value")


class Router:
    """The current route of a model's batches. All routed layers of the model share it."""

    def __init__(self, auxiliary: Sequence[str], share_statistics: bool = False) -> None:
        self.auxiliary = tuple(auxiliary)
        self.share_statistics = share_statistics
        """Whether auxiliary routes have affine parameters only, and use the main statistics."""
        self.plan: tuple[tuple[str, int], ...] = ((MAIN, 1),)
        """(route, images) of consecutive parts of the batch. With one part the count is not used.
        Several counts are scaled in proportion if a layer folds other dimensions into the first."""


class RoutedBatchNorm:
    """Mixin that makes a BatchNorm class select its statistics by route.

    It works with nn.BatchNorm*, nn.SyncBatchNorm and timm's BatchNormAct2d. Each route is a whole
    layer of the original class, so activation and dropout layers are preserved, unless the routes
    share their statistics.
    """

    router: Router
    aux: nn.ModuleDict
    plain: bool
    """Whether the original class normalizes as torch's BatchNorm does."""
    plain_in_eval: bool
    """Whether it does so in evaluation mode, without synchronization."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize each part of the batch `x`, (N, C, …), through its route.

        Raises:
            ValueError: N is not a multiple of the images in the router's plan.
        """
        plan = self.router.plan
        if len(plan) == 1:
            return self._forward_route(plan[0][0], x)
        total = sum(count for _, count in plan)
        if x.shape[0] % total:
            raise ValueError(f"a batch of {x.shape[0]} cannot be routed as {plan}")
        counts = [count * (x.shape[0] // total) for _, count in plan]
        layers = [self._layer(name) for name, _ in plan]
        if self.router.share_statistics:
            return normalize_together(self, layers, counts, x)
        if self.plain and can_normalize_parts(layers, counts, x):
            return normalize_parts(layers, counts, x)
        parts = torch.split(x, counts)
        return torch.cat([self._forward_route(name, part) for (name, _), part in zip(plan, parts, strict=True)])

    def _layer(self, name: str) -> nn.Module:
        return cast(nn.Module, self if name == MAIN else self.aux[name])

    def _forward_route(self, name: str, x: torch.Tensor) -> torch.Tensor:
        layer = self._layer(name)
        shared = self.router.share_statistics
        if self.plain_in_eval and can_use_affine_map(self if shared else layer, x):
            return affine_map(self if shared else layer, x, layer)
        if name == MAIN:
            return cast(torch.Tensor, super().forward(x))  # type: ignore[misc]
        if shared:
            return normalize_together(self, [layer], [len(x)], x)
        return cast(torch.Tensor, layer(x))


@functools.cache
def _routed_class(original: type[nn.Module]) -> type[nn.Module]:
    kinds = {
        "plain": is_plain(original),
        "plain_in_eval": is_plain(unsynchronized(original)),
    }
    return type(f"Routed{original.__name__}", (RoutedBatchNorm, original), kinds)


def add_auxiliary_bns(model: nn.Module, routes: Sequence[str], *, share_statistics: bool = False) -> nn.Module:
    """Add an auxiliary copy of every BatchNorm of `model` for each of `routes`, in place.

    The copies start with the parameters and statistics of the main layer. The output of the main
    route stays bit-equal to that of the unconverted model.

    Args:
        model: any model with BatchNorm layers that has no auxiliary routes yet.
        routes: names of the auxiliary routes, e.g. ("adv",).
        share_statistics: copy the affine parameters only. All routes then use the statistics of the
            main layer, and parts of a batch on different routes are normalized together.

    Returns:
        `model`, on route `main`.

    Raises:
        ArchError: the model has no BatchNorm; the message lists the norms it has. Or statistics
            cannot be shared, because a BatchNorm has a forward method of its own.
        ConfigError: a route name is invalid, or the model already has auxiliary routes.
    """
    for name in routes:
        if name == MAIN or not name.isidentifier():
            raise ConfigError(
                f"the name of an auxiliary route must be an identifier other than {MAIN!r}; found {name!r}"
            )
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if any(isinstance(layer, RoutedBatchNorm) for layer in layers):
        raise ConfigError("the model already has auxiliary BatchNorms")
    if not layers:
        raise ArchError(_no_batchnorm_message(model))
    router = Router(routes, share_statistics)
    for layer in layers:
        if share_statistics and not is_plain(unsynchronized(type(layer))):
            raise ArchError(
                f"{type(layer).__name__} cannot share its statistics between routes, because it has a forward method "
                "of its own; use a recipe with separate statistics, such as advprop"
            )
    for layer in layers:
        copies = {name: Affine(layer) if share_statistics else copy.deepcopy(layer) for name in routes}
        routed = cast(Any, layer)
        routed.__class__ = _routed_class(routed.__class__)
        routed.router = router
        routed.aux = nn.ModuleDict(copies)
    return model


def _no_batchnorm_message(model: nn.Module) -> str:
    kinds = (type(module).__name__ for module in model.modules() if not any(module.children()))
    norms = Counter(kind for kind in kinds if "Norm" in kind)
    found = ", ".join(f"{count} {name}" for name, count in norms.most_common()) or "no normalization layer"
    name = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
    return (
        f"{name} has no BatchNorm: it has {found}. AdvProp needs an architecture with BatchNorm (efficientnet_b0, "
        "resnet50, regnety_016, mobilenetv3_large_100, …), because a second BatchNorm collects the statistics of "
        "adversarial images. This architecture can be trained with --recipe vanilla, adversarial or shared-bn"
    )


def find_router(model: nn.Module) -> Router | None:
    """Return the router of `model`, or None. The model may be wrapped by DDP or torch.compile."""
    for module in model.modules():
        if isinstance(module, RoutedBatchNorm):
            return module.router
    return None


@contextmanager
def route(model: nn.Module, *plan: str | tuple[str, int]) -> Iterator[None]:
    """Send batches through the given BatchNorm route inside the context.

    Args:
        model: a network; without auxiliary BNs it has the route `main` only.
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
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Keep BatchNorms in training mode from updating their running statistics."""
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def strip_auxiliary(state_dict: Mapping[str, _Value]) -> dict[str, _Value]:
    """Return `state_dict` without auxiliary BatchNorms, with the stock model's keys."""
    return {key: value for key, value in state_dict.items() if _route_of(key) == MAIN}


def select_route(state_dict: Mapping[str, _Value], name: str) -> dict[str, _Value]:
    """Return `state_dict` with the BatchNorms of route `name` under the stock model's keys.

    Raises:
        ConfigError: there is no such route.
    """
    known = (MAIN, *auxiliary_routes(state_dict))
    if name not in known:
        raise ConfigError(f"no BatchNorm route {name!r}; available: {', '.join(known)}")
    selected = strip_auxiliary(state_dict)
    if name != MAIN:
        selected |= {_AUX_KEY.sub(".", key): value for key, value in state_dict.items() if _route_of(key) == name}
    return selected


def auxiliary_routes(state_dict: Mapping[str, object]) -> tuple[str, ...]:
    """Return the names of the auxiliary routes of a state dict, in its order."""
    return tuple(name for name in dict.fromkeys(map(_route_of, state_dict)) if name != MAIN)


def shares_statistics(state_dict: Mapping[str, object]) -> bool:
    """Return whether the auxiliary routes of a state dict use the main statistics."""
    with_statistics = {_route_of(key) for key in state_dict if key.endswith(".running_mean")}
    routes = auxiliary_routes(state_dict)
    return bool(routes) and MAIN in with_statistics and not with_statistics.intersection(routes)


def _route_of(key: str) -> str:
    match = _AUX_KEY.search(key)
    return MAIN if match is None else match[1] or match[2]
