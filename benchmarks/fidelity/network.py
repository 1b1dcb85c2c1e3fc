"""ResNets for images of 32 px: timm's reduce them to 8 px before their first block.

cifar_resnet20      the network of "Deep Residual Learning", section 4.2: 0.27 million parameters, and
                    41 million multiply-adds per image, which two cores can train
cifar_resnet20_x2   twice the channels
cifar_resnet18      timm's ResNet-18 with a 3 × 3 stem of stride 1, for a GPU
"""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import nn

__all__ = ["CifarResNet", "cifar_resnet18", "cifar_resnet20", "cifar_resnet20_x2"]

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class _Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            conv = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """Three stages of `blocks` basic blocks with `width`, 2 × and 4 × `width` channels."""

    def __init__(self, blocks: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = 4 * width
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        layers, channels_in = [], width
        for stage in range(3):
            for number in range(blocks):
                stride = 2 if stage and not number else 1
                layers.append(_Block(channels_in, width << stage, stride))
                channels_in = width << stage
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(channels_in, num_classes)
        self.pretrained_cfg = self.default_cfg = _data_config(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.fc(y.mean((2, 3)))


def _data_config(num_classes: int) -> dict[str, Any]:
    return {
        "input_size": (3, 32, 32),
        "mean": MEAN,
        "std": STD,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "num_classes": num_classes,
        "classifier": "fc",
        "first_conv": "conv1",
    }


def _create(width: int, num_classes: int = 10, **_: Any) -> CifarResNet:
    return CifarResNet(3, width, num_classes)


def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Return ResNet-20 with 16, 32 and 64 channels."""
    return _create(16, **kwargs)


def cifar_resnet20_x2(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Return ResNet-20 with 32, 64 and 128 channels."""
    return _create(32, **kwargs)


def cifar_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return ResNet-18 without the reductions before its first block."""
    classes = kwargs.get("num_classes", 10)
    model: Any = timm.create_model("resnet18", num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.pretrained_cfg = model.default_cfg = _data_config(classes)
    return cast(nn.Module, model)


for _architecture in (cifar_resnet20, cifar_resnet20_x2, cifar_resnet18):
    register_model(_architecture)
