"""Create networks by timm's name, restore them from checkpoints and choose their device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from runtime.errors import ArchError, BackendUnavailable, CheckpointError, ConfigError, first_line, nearest
from train.dual_bn import add_auxiliary_bns, auxiliary_routes, select_route, shares_statistics
from train.recipes import MAIN

__all__ = [
    "backbone_parameters",
    "classifier_prefixes",
    "create_model",
    "data_config",
    "load_weights",
    "next_working_size",
    "reset_classifier",
    "resolve_device",
    "restore_model",
    "route_weights",
    "to_channels_last",
    "unsupported_size",
]

_CLASSIFIER_STD = 0.01
_SIZE_STEP = 32
"""Most networks divide their input size by 32."""


def create_model(arch: str, **kwargs: Any) -> nn.Module:
    """Create timm's model `arch`.

    Args:
        arch: an architecture, with or without a pretrained tag (`efficientnet_b3`,
            `tf_efficientnet_b3.ap_in1k`).
        **kwargs: arguments of `timm.create_model`: num_classes, pretrained, drop_path_rate, …

    Raises:
        ArchError: timm has no such architecture (the message suggests the nearest names), or
            the architecture does not accept an argument.
        BackendUnavailable: the pretrained weights cannot be downloaded.
    """
    name = arch.split(".", 1)[0]
    if not timm.is_model(name):
        hint = nearest(name, timm.list_models()) or "`timm.list_models()` lists all"
        raise ArchError(f"timm {timm.__version__} has no architecture {arch!r}; {hint}")
    try:
        model: nn.Module = timm.create_model(arch, **kwargs)
    except (TypeError, RuntimeError, ValueError, AssertionError) as error:
        raise ArchError(f"timm cannot create {arch} with {kwargs}: {first_line(error)}") from error
    except Exception as error:  # the errors of the hub client share no base class with the ones above
        if not kwargs.get("pretrained"):
            raise
        raise BackendUnavailable(
            f"cannot download the pretrained weights of {arch} ({type(error).__name__}: {first_line(error)}); "
            "check the network connection, or use a local file: --weights FILE starts training from it, and "
            "advprop-export --weights FILE exports it"
        ) from error
    return model


def restore_model(
    checkpoint: Mapping[str, Any], path: Path, *, routes: bool = False, bn: str = MAIN, ema: bool = True
) -> nn.Module:
    """Create the network of an advprop checkpoint and load its weights, on the CPU.

    Args:
        checkpoint: the content, as `load_checkpoint` returns it.
        path: the file it was read from, for error messages.
        routes: keep the auxiliary BatchNorms; otherwise return the stock timm model.
        bn: the route whose BatchNorms the stock model gets.
        ema: prefer the moving average of the weights if the checkpoint has one.

    Raises:
        CheckpointError: the weights do not fit the architecture, or the checkpoint has model
            arguments that the trainer never writes.
        ArchError: timm does not have the architecture.
        ConfigError: the checkpoint has no route `bn`.
    """
    arch = str(checkpoint["arch"])
    model = create_model(arch, **_model_arguments(checkpoint["model_kwargs"], path))
    if not routes:
        load_weights(model, route_weights(checkpoint, bn=bn, ema=ema), path, arch)
        return model
    weights = _stored_weights(checkpoint, ema)
    names = auxiliary_routes(weights)
    try:
        if names:
            add_auxiliary_bns(model, names, share_statistics=shares_statistics(weights))
        load_weights(model, weights, path, arch)
    except ConfigError as error:
        raise CheckpointError(f"{path} has invalid BatchNorm routes: {error}") from error
    return model


def route_weights(checkpoint: Mapping[str, Any], *, bn: str = MAIN, ema: bool = True) -> dict[str, torch.Tensor]:
    """Return the weights of route `bn` under the stock model's keys.

    Raises:
        ConfigError: the checkpoint has no such route.
    """
    return select_route(_stored_weights(checkpoint, ema), bn)


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], path: Path, arch: str) -> None:
    """Load `weights` into `model`; their keys and shapes must match exactly.

    Raises:
        CheckpointError: they do not match; the message shows the first keys or shapes.
    """
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise CheckpointError(f"the weights in {path} do not fit timm's {arch}: {' '.join(lines)[:300]}") from error


def _stored_weights(checkpoint: Mapping[str, Any], ema: bool) -> dict[str, torch.Tensor]:
    return dict((ema and checkpoint.get("ema_state_dict")) or checkpoint["state_dict"])


def _model_arguments(found: Any, path: Path) -> dict[str, Any]:
    """Return the model arguments, if they are among those that the trainer writes.

    Others could make timm read or download files.
    """
    allowed = {"num_classes": int, "drop_rate": float, "drop_path_rate": float}
    valid = isinstance(found, dict) and all(isinstance(found[key], allowed.get(key, ())) for key in found)
    if not valid:
        raise CheckpointError(f"{path} has model_kwargs {found!r}; expected only {', '.join(allowed)}")
    return dict(found)


def classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return the first parts of the names of the classifier's weights, such as ("fc.",)."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def backbone_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a timm model except those of its classifier.

    Raises:
        ArchError: timm does not know the classifier of this architecture.
    """
    head = classifier_prefixes(model)
    if not head:
        raise ArchError(f"timm does not name the classifier of {type(model).__name__}", fix="remove --freeze-backbone")
    return [parameter for name, parameter in model.named_parameters() if not name.startswith(head)]


def reset_classifier(model: nn.Module) -> None:
    """Give the classifier small random weights, in place.

    timm's initial weights of some classifiers are so large for few classes that the first gradients
    destroy pretrained weights: EfficientNet-Lite0 with 10 classes starts with a loss of 6 instead of
    ln 10 = 2.3, and with 25 times the gradient.
    """
    prefixes = classifier_prefixes(model)
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=_CLASSIFIER_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


def data_config(model: nn.Module) -> dict[str, Any]:
    """Return timm's data configuration of `model`, plus `fixed_input_size`, a bool."""
    fixed = getattr(model, "pretrained_cfg", {}).get("fixed_input_size", False)
    return {**resolve_model_data_config(model), "fixed_input_size": bool(fixed)}


def unsupported_size(arch: str, size: int) -> str:
    """Return why the network cannot train on images of `size` pixels, or an empty string.

    The network runs on torch's `meta` device, which computes shapes only. A network that cannot be
    created there is not checked.
    """
    with torch.device("meta"), torch.no_grad(), torch.random.fork_rng(()):
        try:
            model = create_model(arch, num_classes=2).train()
        except ArchError:
            return ""
        try:
            model(torch.empty(2, 3, size, size))
        except (RuntimeError, ValueError, AssertionError) as error:
            return first_line(error)
    return ""


def next_working_size(arch: str, size: int, limit: int) -> int | None:
    """Return the smallest multiple of 32 above `size`, up to `limit`, that the network accepts.

    Returns:
        The size in pixels, or None if there is none.
    """
    multiples = range(size - size % _SIZE_STEP + _SIZE_STEP, limit + 1, _SIZE_STEP)
    return next((larger for larger in multiples if not unsupported_size(arch, larger)), None)


def to_channels_last(model: nn.Module) -> nn.Module:
    """Store the weights of 2-D convolutions in channels-last layout, in place, and return `model`.

    `model.to(memory_format=torch.channels_last)` does the same, but raises an error if the model
    also has 3-D convolutions, as networks with lambda layers do.
    """
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def resolve_device(name: str) -> torch.device:
    """Return the torch device `name`; `auto` is CUDA if torch finds a GPU, otherwise the CPU.

    Raises:
        ConfigError: torch does not know the device or cannot use it.
        BackendUnavailable: `name` is a CUDA device and torch finds no GPU.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name!r} is not a torch device: {first_line(error)}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable(f"--device {name}: torch {torch.__version__} finds no NVIDIA GPU; use --device cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device {name} cannot be used here: {first_line(error)}") from error
    return device
