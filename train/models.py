"""timm models by name, with errors that help."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from runtime.errors import ArchError, BackendUnavailable, first_line, nearest

__all__ = ["create_model"]


def create_model(arch: str, **kwargs: Any) -> nn.Module:
    """Makes timm's model `arch`.

    Args:
        arch: an architecture, with or without a pretrained tag (`efficientnet_b3`,
            `tf_efficientnet_b3.ap_in1k`).
        **kwargs: for `timm.create_model`: num_classes, pretrained, drop_path_rate, …

    Raises:
        ArchError: timm has no such architecture; the message has the nearest names. Or it
            does not take an argument.
        BackendUnavailable: pretrained weights could not be downloaded.
    """
    name = arch.split(".", 1)[0]
    if not timm.is_model(name):
        hint = nearest(name, timm.list_models()) or "`timm.list_models()` lists all"
        raise ArchError(f"timm {timm.__version__} has no architecture {arch!r}; {hint}")
    try:
        model: nn.Module = timm.create_model(arch, **kwargs)
    except (TypeError, RuntimeError, ValueError, AssertionError) as error:
        raise ArchError(f"timm cannot make {arch} with {kwargs}: {first_line(error)}") from error
    except Exception as error:  # the hub client's errors share no base with ours
        if not kwargs.get("pretrained"):
            raise
        raise BackendUnavailable(
            f"the pretrained weights of {arch} could not be downloaded ({type(error).__name__}: "
            f"{first_line(error)}); check the network, or do without: "
            "advprop-export takes a file, --weights FILE; train without --pretrained"
        ) from error
    return model
