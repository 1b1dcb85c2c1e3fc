"""One process or many: who am I, what do we share, and BatchNorm over all of us.

`torchrun` starts the processes and sets the environment; nothing here starts any.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    "barrier",
    "gather",
    "process_group",
    "rank",
    "shuffled_across_processes",
    "synchronize_batch_norms",
    "unsynchronized",
    "world_size",
    "world_sum",
]


def world_size() -> int:
    """Returns how many processes train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Returns this process's number, 0 to `world_size() - 1`."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Joins the group that torchrun announces, if any; yields this process's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    # torchrun restarts processes onto the same store. What those before them left there would
    # be taken for the address of a living one, so each attempt has keys of its own.
    store, number, size = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(f"attempt-{attempt}", store),
        rank=number,
        world_size=size,
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()


def world_sum(value: torch.Tensor) -> torch.Tensor:
    """Returns the sum of a detached tensor over all processes."""
    if world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value


def gather(value: Any) -> list[Any]:
    """Returns every process's `value`, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits for all processes."""
    if world_size() > 1:
        dist.barrier()


def shuffled_across_processes(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Deals all processes' images out anew, each process getting as many as it gave.

    In one process there is nothing to shuffle: a BatchNorm does not see order.

    Args:
        images: (N, …), the same N everywhere, detached.
        labels: (N,).
    """
    if world_size() == 1:
        return images, labels
    all_images = [torch.empty_like(images) for _ in range(world_size())]
    all_labels = [torch.empty_like(labels) for _ in range(world_size())]
    dist.all_gather(all_images, images.contiguous())
    dist.all_gather(all_labels, labels.contiguous())
    order = torch.randperm(len(labels) * world_size(), device=labels.device)
    dist.broadcast(order, src=0)
    mine = order[rank() :: world_size()]
    return torch.cat(all_images)[mine], torch.cat(all_labels)[mine]


def synchronize_batch_norms(model: nn.Module) -> nn.Module:
    """Makes every BatchNorm of `model` normalize over the images of all processes, in place.

    Call it before `add_auxiliary_bns`: each route then synchronizes by itself. torch's
    SyncBatchNorm knows no CPU, so this works on any backend of torch.distributed.
    """
    for layer in model.modules():
        if isinstance(layer, _BatchNorm) and not isinstance(layer, _Synchronized):
            synchronized = cast(Any, layer)
            synchronized.__class__ = type(f"Sync{type(layer).__name__}", (_Synchronized, type(layer)), {})
    return model


def unsynchronized(kind: type[nn.Module]) -> type[nn.Module]:
    """Returns the class that `synchronize_batch_norms` made `kind` of, or `kind` itself."""
    return kind.__bases__[1] if issubclass(kind, _Synchronized) else kind


class _Synchronized:
    """Mixin: batch statistics over all processes, differentiable on each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = cast(Any, self)
        if world_size() == 1 or not layer.training:
            return cast(torch.Tensor, super().forward(x))  # type: ignore[misc]
        y = _normalize(layer, x)
        # timm's BatchNormAct2d drops and activates after normalizing.
        return cast(torch.Tensor, layer.act(layer.drop(y)) if hasattr(layer, "act") else y)


def _normalize(layer: Any, x: torch.Tensor) -> torch.Tensor:
    dims = [dim for dim in range(x.ndim) if dim != 1]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    wide = x.double() if x.device.type == "cpu" else x.float()
    # Two sums one after the other, not a difference of squares: that loses a small variance beside a large mean.
    sums = torch.cat([wide.sum(dims), wide.new_full((1,), x.numel() / x.shape[1])])
    totals = cast(torch.Tensor, _AllReduceSum.apply(sums))
    mean, count = totals[:-1] / totals[-1], totals[-1]
    centerd = wide - mean.view(shape)
    variance = cast(torch.Tensor, _AllReduceSum.apply(centerd.square().sum(dims))) / count
    if layer.track_running_stats and layer.running_mean is not None:
        with torch.no_grad():
            layer.num_batches_tracked.add_(1)
            momentum = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
            unbiased = variance * count / (count - 1)
            layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), momentum)
            layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), momentum)
    y = centerd * torch.rsqrt(variance + layer.eps).view(shape)
    if layer.affine:
        y = y * layer.weight.view(shape) + layer.bias.view(shape)
    return y.to(x.dtype)


class _AllReduceSum(torch.autograd.Function):
    """Sum over processes; its gradient is the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> Any:
        total = gradient[0].clone()
        dist.all_reduce(total)
        return total
