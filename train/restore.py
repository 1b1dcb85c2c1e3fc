"""A checkpoint's weights back into a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runtime.errors import CheckpointError, ConfigError
from train.dual_bn import add_auxiliary_bns, auxiliary_routes, select_route
from train.models import create_model
from train.recipes import MAIN

__all__ = ["load_weights", "restore_model", "route_weights"]


def restore_model(
    checkpoint: Mapping[str, Any], path: Path, *, routes: bool = False, bn: str = MAIN, ema: bool = True
) -> nn.Module:
    """Makes the network of one of our checkpoints, with its weights, on the CPU.

    Args:
        checkpoint: what `load_checkpoint` returned.
        path: where it came from, for messages.
        routes: keep the auxiliary BatchNorms; else it is the stock timm model.
        bn: whose BatchNorms the stock model gets.
        ema: take the moving average of the weights, where there is one.

    Raises:
        CheckpointError: the weights do not fit the architecture, or the arguments of the
            model are not those our trainer gives.
        ArchError: timm does not have the architecture.
        ConfigError: there is no route `bn`.
    """
    arch = str(checkpoint["arch"])
    model = create_model(arch, **_model_arguments(checkpoint["model_kwargs"], path))
    if not routes:
        load_weights(model, route_weights(checkpoint, bn=bn, ema=ema), path, arch)
        return model
    weights = _weights(checkpoint, ema)
    names = auxiliary_routes(weights)
    try:
        load_weights(add_auxiliary_bns(model, names) if names else model, weights, path, arch)
    except ConfigError as error:
        raise CheckpointError(f"{path} has BatchNorm routes that cannot be: {error}") from error
    return model


def route_weights(checkpoint: Mapping[str, Any], *, bn: str = MAIN, ema: bool = True) -> dict[str, torch.Tensor]:
    """Returns the weights of route `bn`, under the stock model's keys.

    Raises:
        ConfigError: there is no such route.
    """
    return select_route(_weights(checkpoint, ema), bn)


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], path: Path, arch: str) -> None:
    """Loads `weights`, all of them and nothing else.

    Raises:
        CheckpointError: they do not fit; the message has the first keys or shapes.
    """
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise CheckpointError(f"the weights in {path} do not fit timm's {arch}: {' '.join(lines)[:300]}") from error


def _weights(checkpoint: Mapping[str, Any], ema: bool) -> dict[str, torch.Tensor]:
    return dict((ema and checkpoint.get("ema_state_dict")) or checkpoint["state_dict"])


def _model_arguments(found: Any, path: Path) -> dict[str, Any]:
    """The arguments our trainer gives; others could make timm download or read files."""
    allowed = {"num_classes": int, "drop_rate": float, "drop_path_rate": float}
    fine = isinstance(found, dict) and all(isinstance(found[key], allowed.get(key, ())) for key in found)
    if not fine:
        raise CheckpointError(f"{path} has model_kwargs {found!r}; expected only {', '.join(allowed)}")
    return dict(found)
