"""Rewrite a trained network into the form that is exported, which computes the same logits.

Shape suffixes: N images, G groups, E experts, O output channels of a group, C channels, H height,
W width.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from timm.layers import CondConv2d
from timm.layers.padding import pad_same
from timm.utils.model import reparameterize_model
from torch import nn

from runtime.errors import first_line

__all__ = ["can_be_reparameterized", "inference_form"]

log = logging.getLogger(__name__)

_METHODS = ("fuse", "reparameterize", "switch_to_deploy")
"""Methods of modules that `timm.utils.reparameterize_model` calls."""


def inference_form(model: nn.Module) -> nn.Module:
    """Return the network in its inference form, or `model` itself if there is no other form.

    - Parallel branches that exist for training only become one convolution (MobileOne, RepVGG,
      FastViT, RepViT, RepGhost and others), by timm's `reparameterize_model`, in float64.
    - A conditional convolution (CondConv) computes the outputs of all experts and weights them. The
      trained form weights their kernels for each image, which ONNX cannot express.

    Args:
        model: a stock timm model in eval mode, which is not changed.
    """
    reparameterize = can_be_reparameterized(model)
    conditional = any(isinstance(module, CondConv2d) for module in model.modules())
    if not (reparameterize or conditional):
        return model
    result = copy.deepcopy(model)
    if reparameterize:
        try:
            result = reparameterize_model(result.double(), inplace=True).float().eval()
        except (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
            log.warning("exporting the training-time branches: timm cannot fuse them: %s", first_line(error))
            result = copy.deepcopy(model)
    if conditional:
        _replace_conditional(result)
    return result


def can_be_reparameterized(model: nn.Module) -> bool:
    """Return whether timm can fuse modules of the network."""
    return any(callable(getattr(module, name, None)) for module in model.modules() for name in _METHODS)


def _replace_conditional(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, CondConv2d):
            setattr(module, name, _WeightedExperts(child))
        else:
            _replace_conditional(child)


class _WeightedExperts(nn.Module):
    """A CondConv2d that weights the outputs of its experts instead of their kernels."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.experts, self.groups, self.padding = layer.num_experts, layer.groups, layer.padding
        self.pads_by_size, self.stride, self.dilation = layer.dynamic_padding, layer.stride, layer.dilation
        # A grouped convolution needs the output channels of a group next to each other.
        by_expert: torch.Tensor = layer.weight.detach().unflatten(1, (layer.groups, -1, *layer.weight_shape[1:]))
        self.weight = nn.Parameter(by_expert.transpose(0, 1).flatten(0, 2))
        self.bias = None
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.detach().unflatten(1, (layer.groups, -1)).transpose(0, 1).flatten())

    def forward(self, x_NCHW: torch.Tensor, weights_NE: torch.Tensor) -> torch.Tensor:
        padding = self.padding
        if self.pads_by_size:
            x_NCHW, padding = pad_same(x_NCHW, self.weight.shape[-2:], self.stride, self.dilation), (0, 0)
        y_NCHW = nn.functional.conv2d(x_NCHW, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)
        y_NGEOHW: torch.Tensor = torch.unflatten(y_NCHW, 1, (self.groups, self.experts, -1))
        return (y_NGEOHW * weights_NE[:, None, :, None, None, None]).sum(2).flatten(1, 2)
