"""Run a checkpoint in PyTorch, for evaluation.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from advprop.checkpoints import LoadedPredictor
from runtime.spec import ModelSpec
from runtime.system.files import sha256_file
from train.checkpoint import load_checkpoint
from train.models import resolve_device, restore_model

__all__ = ["load_predictor", "restore_for_evaluation"]


def load_predictor(path: Path, *, route: str, ema: bool = True, device: str) -> LoadedPredictor:
    """Implement `advprop.checkpoints.load_predictor`."""
    spec, model, place, facts = restore_for_evaluation(path, route=route, ema=ema, device=device)

    def predict(images_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits_NK: NDArray[np.float32] = model(torch.from_numpy(images_NCHW).to(place)).float().cpu().numpy()
        return logits_NK

    config: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    return LoadedPredictor(spec, predict, not config.get("fixed_input_size"), facts)


def restore_for_evaluation(
    path: Path, *, route: str, ema: bool = True, device: str
) -> tuple[ModelSpec, nn.Module, torch.device, dict[str, Any]]:
    """Load the network of a checkpoint in float32 and evaluation mode, without its other routes.

    Returns:
        The spec, the network, its device, and facts for results (plain values). `weights_bytes`
        counts the weights for inference, without the optimizer's state and auxiliary BatchNorms.
    """
    checkpoint = load_checkpoint(path)
    spec = ModelSpec.from_json(checkpoint["spec"], where=str(path))
    place = resolve_device(device)
    model = restore_model(checkpoint, path, bn=route, ema=ema).eval().to(place)
    sha256 = sha256_file(path)
    facts = {
        "kind": "checkpoint",
        "sha256": sha256,
        "size_bytes": path.stat().st_size,
        "weights_bytes": sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()),
        "precision": "fp32",
        "arch": spec.arch,
        "backend": f"torch {torch.__version__}",
        "device": place.type,
        "route": route,
        "weights": "moving average" if ema and checkpoint.get("ema_state_dict") else "last",
    }
    return dataclasses.replace(spec, route=route, checkpoint_sha256=sha256), model, place, facts
