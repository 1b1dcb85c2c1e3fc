"""Small networks with a BatchNorm in every place where one is folded or left."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from runtime.spec import ModelSpec, Preprocessing

__all__ = ["NETWORKS", "SPEC", "Colors", "norm_layers", "randomize_norms"]

CLASSES = 3
SPEC = ModelSpec(
    arch="toy",
    classes=("a", "b", "c"),
    preprocessing=Preprocessing(
        height=16, width=16, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0
    ),
)
"""The spec of these networks."""


def _head(channels: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)


class _Transposed(nn.Sequential):
    def __init__(self) -> None:
        up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), up, nn.BatchNorm2d(6), nn.ReLU(), *_head(6))


class _PreActivation(nn.Module):
    """A residual network whose BatchNorms come before the convolutions, so two are not folded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.head = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), *_head(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + conv(torch.relu(norm(x)))
        return self.head(x)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8, eps=1e-3),
        nn.SiLU(),
        *_head(8),
    ),
    "depthwise": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 6, 1, bias=False),
        nn.BatchNorm2d(6),
        *_head(6),
    ),
    "transposed": _Transposed,
    "one-dimensional": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
        nn.BatchNorm1d(10),
        nn.ReLU(),
        nn.Linear(10, CLASSES),
    ),
    "pre-activation": _PreActivation,
}
"""Name → function that creates a network from (N, 3, H, W) to 3 logits."""


def norm_layers(network: nn.Module) -> list[nn.BatchNorm1d | nn.BatchNorm2d]:
    """Return the BatchNorms of a network, in the order of its modules."""
    return [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]


def randomize_norms(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give the BatchNorms parameters as after training, negative γ included; return it in eval mode."""
    random = torch.Generator().manual_seed(seed)
    for layer in norm_layers(network):
        shape = layer.weight.shape
        layer.weight.data = torch.randn(shape, generator=random)
        layer.bias.data = torch.randn(shape, generator=random)
        assert layer.running_mean is not None and layer.running_var is not None
        layer.running_mean.copy_(torch.randn(shape, generator=random) / 4)
        layer.running_var.copy_(torch.rand(shape, generator=random) + 0.05)
    return network.eval()


class Colors(nn.Module):
    """Classifies by the mean of each color, relative to the training images; some colors count more."""

    def __init__(self, inputs_NCHW: np.ndarray) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.conv.weight.data = torch.eye(3)[:, :, None, None]
        self.norm = nn.BatchNorm2d(3)
        self.norm.weight.data = torch.tensor([1.0, 1.5, 0.7])
        self.norm.running_mean = torch.from_numpy(inputs_NCHW.mean((0, 2, 3)))
        self.norm.running_var = torch.from_numpy(inputs_NCHW.var((0, 2, 3)))

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return 8 * self.norm(self.conv(images_NCHW)).mean((2, 3))
