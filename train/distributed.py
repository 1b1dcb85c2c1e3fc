"""Train in several processes: process group, communication and synchronized BatchNorm.

`torchrun` starts the processes and sets their environment variables.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    "StopRequest",
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
    """Return the number of processes that train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, 0 to `world_size() - 1`."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the process group if torchrun started one; yield the device of this process."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    # torchrun restarts processes with the same store. Addresses left there by the previous
    # processes would be mistaken for live ones, so each attempt uses its own keys.
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


class StopRequest:
    """Records the signal that requested the run to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM: the first is recorded, the second raises KeyboardInterrupt."""

        def record(number: int, _: FrameType | None) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = signal.Signals(number)

        try:
            before = {number: signal.signal(number, record) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: the caller of `fit` handles signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def share(self, device: torch.device) -> None:
        """Make all processes stop if one was signaled; they would wait for it forever."""
        if world_size() > 1:
            signaled = world_sum(torch.tensor([float(self.signal or 0)], device=device)).item()
            self.signal = self.signal or (signal.SIGTERM if signaled else None)


def world_sum(value: torch.Tensor) -> torch.Tensor:
    """Return the sum of a detached tensor over all processes."""
    if world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value


def gather(value: Any) -> list[Any]:
    """Return the `value` of every process, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def shuffled_across_processes(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shuffle the images across all processes; each process keeps its number of images.

    A single process returns its images unchanged, because BatchNorm does not depend on their
    order.

    Args:
        images: (N, …), detached, with the same N in every process.
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
    """Make every BatchNorm of `model` normalize over the images of all processes, in place.

    Call it before `add_auxiliary_bns`: each route then synchronizes separately. Unlike torch's
    SyncBatchNorm it also works on CPUs, with any backend of torch.distributed.
    """
    for layer in model.modules():
        if isinstance(layer, _BatchNorm) and not isinstance(layer, _Synchronized):
            synchronized = cast(Any, layer)
            synchronized.__class__ = type(f"Sync{type(layer).__name__}", (_Synchronized, type(layer)), {})
    return model


def unsynchronized(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that `synchronize_batch_norms` derived `kind` from, or `kind` itself."""
    return kind.__bases__[1] if issubclass(kind, _Synchronized) else kind


class _Synchronized:
    """Mixin that computes differentiable batch statistics over all processes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = cast(Any, self)
        if not is_synchronized(layer):
            return cast(torch.Tensor, super().forward(x))  # type: ignore[misc]
        y = normalize_over_processes(layer, x, layer.weight, layer.bias)
        # timm's BatchNormAct2d applies dropout and activation after normalizing.
        return cast(torch.Tensor, layer.act(layer.drop(y)) if hasattr(layer, "act") else y)


def is_synchronized(layer: nn.Module) -> bool:
    """Return whether the BatchNorm `layer` normalizes over the images of several processes now."""
    return isinstance(layer, _Synchronized) and world_size() > 1 and cast(nn.Module, layer).training


def normalize_over_processes(
    layer: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """Normalize over the images of all processes, and update the running statistics of `layer`.

    Args:
        layer: the BatchNorm.
        x: images of this process, (N, C, …).
        weight: scale of each channel, (C,), or None.
        bias: shift of each channel, (C,), or None.
    """
    dims = [dim for dim in range(x.ndim) if dim != 1]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    wide = x.double() if x.device.type == "cpu" else x.float()
    # The mean is subtracted before squaring: E[x²] − E[x]² loses a variance that is small compared
    # to the mean.
    sums = torch.cat([wide.sum(dims), wide.new_full((1,), x.numel() / x.shape[1])])
    totals = cast(torch.Tensor, _AllReduceSum.apply(sums))
    mean, count = totals[:-1] / totals[-1], totals[-1]
    centered = wide - mean.view(shape)
    variance = cast(torch.Tensor, _AllReduceSum.apply(centered.square().sum(dims))) / count
    if layer.track_running_stats and layer.running_mean is not None:
        with torch.no_grad():
            layer.num_batches_tracked.add_(1)
            momentum = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
            unbiased = variance * count / (count - 1)
            layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), momentum)
            layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), momentum)
    y = centered * torch.rsqrt(variance + layer.eps).view(shape)
    if weight is not None and bias is not None:
        y = y * weight.view(shape) + bias.view(shape)
    return y.to(x.dtype)


class _AllReduceSum(torch.autograd.Function):
    """Sum over processes; its gradient is the sum of the gradients of all processes."""

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
