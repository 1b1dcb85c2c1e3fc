"""Freeze the backbone in the first epochs, while the classifier learns from random weights."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from train.distributed import world_size
from train.models import backbone_parameters

__all__ = ["Backbone"]


class Backbone:
    """All layers of a network except its classifier."""

    def __init__(self, model: nn.Module, epochs: int) -> None:
        """
        Args:
            model: a timm model, not wrapped by DDP or torch.compile.
            epochs: epochs in which it is frozen.

        Raises:
            ArchError: `epochs` is not 0, and timm does not know the classifier of the architecture.
        """
        self._parameters = backbone_parameters(model) if epochs else []
        self._norms = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)] if epochs else []
        self._epochs = epochs
        self._frozen = False

    def start_epoch(self, epoch: int) -> None:
        """Freeze or release the layers for epoch `epoch` (from 0). The model is in training mode."""
        self._frozen = epoch < self._epochs
        if self._frozen:
            for layer in self._norms:  # keep the statistics that the weights were trained with
                layer.eval()
        if world_size() == 1:  # DistributedDataParallel expects a gradient of every parameter
            for parameter in self._parameters:
                parameter.requires_grad_(not self._frozen)

    def drop_gradients(self) -> None:
        """Remove the gradients of frozen layers, so the optimizer skips them."""
        if self._frozen:
            for parameter in self._parameters:
                parameter.grad = None
