"""BatchNorm whose routes share their statistics and have separate affine parameters.

Clean and adversarial images are normalized together; each route then scales and shifts its images.
In hybrid adversarial training, separate affine parameters matter more than separate statistics
(Zhang et al., "Towards Understanding Dual BN In Hybrid Adversarial Training", arXiv 2403.19150).
Shapes: (N, C, …), N images, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import nn

from train.distributed import is_synchronized, normalize_over_processes

__all__ = ["Affine", "normalize_together"]


class Affine(nn.Module):
    """The scale and shift of one route; without parameters if the BatchNorm has none."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, layer: Any) -> None:
        """Copy the parameters of a BatchNorm."""
        super().__init__()
        for name in ("weight", "bias"):
            value = getattr(layer, name)
            copied = None if value is None else nn.Parameter(value.detach().clone(), value.requires_grad)
            self.register_parameter(name, copied)


def normalize_together(layer: Any, affines: Sequence[Any], counts: Sequence[int], x: torch.Tensor) -> torch.Tensor:
    """Normalize a batch with the statistics of `layer`, and scale and shift each part.

    In training mode, the statistics are those of the whole batch.

    Args:
        layer: a BatchNorm, whose running statistics are used and updated, and whose `drop` and
            `act` are applied.
        affines: objects with the `weight` and `bias` of each part, (C,), or None for both.
        counts: images of each part.
        x: the batch.
    """
    if len(affines) == 1:
        y = _normalize(layer, x, affines[0].weight, affines[0].bias)
    elif layer.affine:
        shape = [x.shape[0], -1, *[1] * (x.ndim - 2)]
        weight, bias = (
            torch.cat([getattr(part, name).expand(count, -1) for part, count in zip(affines, counts, strict=True)])
            for name in ("weight", "bias")
        )
        y = torch.addcmul(bias.view(shape), _normalize(layer, x, None, None).to(weight.dtype), weight.view(shape))
        y = y.to(x.dtype)
    else:
        y = _normalize(layer, x, None, None)
    return cast(torch.Tensor, layer.act(layer.drop(y)) if isinstance(layer, BatchNormAct2d) else y)


def _normalize(layer: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply the BatchNorm `layer` with other affine parameters."""
    if is_synchronized(layer):
        return normalize_over_processes(layer, x, weight, bias)
    updates = layer.training and layer.track_running_stats
    momentum = layer.momentum or 0.0
    if updates and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if layer.momentum is None:
            momentum = 1.0 / float(layer.num_batches_tracked)
    mean, variance = (layer.running_mean, layer.running_var) if updates or not layer.training else (None, None)
    return F.batch_norm(x, mean, variance, weight, bias, layer.training or mean is None, momentum, layer.eps)
