"""Faster BatchNorm for the two cases that dominate its cost in AdvProp.

`normalize_parts` normalizes consecutive parts of a batch with their own statistics and writes the
results into one tensor; slicing and `torch.cat` would copy every activation twice.
`affine_map` is BatchNorm on running statistics for an attack.

Both compute the same as the layers. `can_normalize_parts` and `can_use_affine_map` check whether
they apply; otherwise the forward method of the layers is used. Shapes: (N, C, …), N images, C
channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["affine_map", "can_normalize_parts", "can_use_affine_map", "is_plain", "normalize_parts"]


def is_plain(kind: type[nn.Module]) -> bool:
    """Return whether `kind` is torch's BatchNorm, optionally with timm's dropout and activation."""
    return any(kind.forward is known.forward for known in (_BatchNorm, BatchNormAct2d))


def can_use_affine_map(layer: Any, x: torch.Tensor) -> bool:
    """Return whether `affine_map` can replace the layer.

    The layer must normalize with running statistics, and only the input may need a gradient, as in
    an attack.
    """
    return (
        torch.is_grad_enabled()
        and x.requires_grad
        and not layer.training
        and layer.affine
        and layer.running_var is not None
        and not layer.weight.requires_grad
        and layer.weight.dtype == x.dtype
        and not _has_hooks(layer)
    )


def affine_map(layer: Any, x: torch.Tensor, affine: Any = None) -> torch.Tensor:
    """Apply a BatchNorm on running statistics as `x * scale + shift`.

    The `weight` and `bias` are those of `affine` (default: `layer`). The backward pass reads memory
    once and needs no stored activations. The backward pass of a BatchNorm also sums over the
    activations, for parameter gradients that an attack does not need.
    """
    shape = [1, -1, *[1] * (x.ndim - 2)]
    affine = layer if affine is None else affine
    scale = affine.weight * torch.rsqrt(layer.running_var + layer.eps)
    shift = affine.bias - layer.running_mean * scale
    return _drop_and_activate(layer, torch.addcmul(shift.view(shape), x, scale.view(shape)))


def can_normalize_parts(layers: Sequence[Any], counts: Sequence[int], x: torch.Tensor) -> bool:
    """Return whether `normalize_parts` can replace the layers.

    The input must be dense. For other inputs, such as a slice of channels, `native_batch_norm.out`
    does not write `save_mean`, normalizes with uninitialized memory and reports no error (torch
    2.14). The device must be a CPU, since other devices were not measured. torch.compile joins the
    parts without this function.
    """
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and x.dtype in (torch.float32, torch.float64)
        and _is_dense(x)
        and min(counts) * math.prod(x.shape[2:]) > 1  # the layers raise an error for a single value
        and all(_can_be_joined(layer, x) for layer in layers)
    )


def _is_dense(x: torch.Tensor) -> bool:
    """Return whether `x` is contiguous or channels-last, the layouts torch's kernel supports."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.is_contiguous() or (x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim]))


def _can_be_joined(layer: Any, x: torch.Tensor) -> bool:
    return bool(
        layer.training
        and layer.affine
        and layer.num_features == x.shape[1]
        and all(
            tensor is None or tensor.dtype == x.dtype
            for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var)
        )
        and (layer.momentum is not None or not layer.track_running_stats)
        and not _has_hooks(layer)
    )


def normalize_parts(layers: Sequence[Any], counts: list[int], x: torch.Tensor) -> torch.Tensor:
    """Normalize consecutive parts of a batch, `counts[i]` images with `layers[i]` each.

    Running statistics are updated as in the forward method of the layers. All layers have the same
    `drop` and `act`; those of the first layer are applied.
    """
    for layer in layers:
        if layer.track_running_stats and layer.num_batches_tracked is not None:
            layer.num_batches_tracked.add_(1)
    parameters = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
    return _drop_and_activate(layers[0], cast(torch.Tensor, _NormalizedParts.apply(x, layers, counts, *parameters)))


def _has_hooks(layer: nn.Module) -> bool:
    """Return whether the layer has hooks. Only a call of the layer itself runs them."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _drop_and_activate(layer: Any, y: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, layer.act(layer.drop(y)) if isinstance(layer, BatchNormAct2d) else y)


class _NormalizedParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layers: Sequence[Any], counts: list[int], *_: nn.Parameter) -> torch.Tensor:
        y = torch.empty_like(x)
        saved: list[torch.Tensor] = [x]
        for layer, x_part, y_part in zip(layers, torch.split(x, counts), torch.split(y, counts), strict=True):
            mean, inverse_std = x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
            tracked = layer.track_running_stats
            torch.ops.aten.native_batch_norm.out(
                x_part,
                layer.weight,
                layer.bias,
                layer.running_mean if tracked else None,
                layer.running_var if tracked else None,
                True,
                layer.momentum or 0.0,
                layer.eps,
                out=y_part,
                save_mean=mean,
                save_invstd=inverse_std,
            )
            saved += [layer.weight, mean, inverse_std]
        ctx.counts, ctx.eps = counts, [layer.eps for layer in layers]
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    @once_differentiable  # mean and deviation are constants here: a second derivative would be wrong
    def backward(ctx: Any, *gradient: torch.Tensor) -> Any:
        x, *saved = ctx.saved_tensors
        gradient_x = torch.empty_like(x)
        gradients: list[torch.Tensor] = []
        parts = zip(*(torch.split(tensor, ctx.counts) for tensor in (x, gradient[0], gradient_x)), strict=True)
        for number, (x_part, gradient_part, result) in enumerate(parts):
            weight, mean, inverse_std = saved[3 * number : 3 * number + 3]
            by_x, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
                gradient_part,
                x_part,
                weight,
                None,
                None,
                mean,
                inverse_std,
                True,
                ctx.eps[number],
                [True, True, True],
            )
            result.copy_(by_x)
            gradients += [by_weight, by_bias]
        return gradient_x, None, None, *gradients
