"""A checkpoint as a function from images to logits: what the runtime evaluates beside the files made from it.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from runtime.errors import BackendUnavailable
from runtime.spec import ModelSpec
from runtime.system.files import sha256_file
from train.checkpoint import load_checkpoint
from train.recipes import MAIN
from train.restore import restore_model

__all__ = ["Predict", "device_for", "load_predictor", "restore_for_evaluation"]

Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Normalized images, (N, 3, H, W) → logits, (N, K)."""


def load_predictor(
    path: Path, *, route: str = MAIN, ema: bool = True, device: str = "auto"
) -> tuple[ModelSpec, Predict, bool, dict[str, Any]]:
    """Loads a checkpoint for evaluation, in float32.

    Args:
        path: one of our checkpoints.
        route: whose BatchNorms it is evaluated through.
        ema: prefer the moving average of the weights.
        device: `auto` (a GPU where there is one), `cpu` or `cuda`.

    Returns:
        Its description; the function; whether it takes images of any size; and what a result says of it, plain values.

    Raises:
        CheckpointError: not a checkpoint of ours.
        ConfigError: it has no such route.
        BackendUnavailable: there is no GPU for `cuda`.
    """
    spec, model, place, facts = restore_for_evaluation(path, route=route, ema=ema, device=device)

    def predict(images_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits_NK: NDArray[np.float32] = model(torch.from_numpy(images_NCHW).to(place)).float().cpu().numpy()
        return logits_NK

    config: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    size_open = not config.get("fixed_input_size")
    return spec, predict, size_open, facts


def device_for(name: str) -> torch.device:
    """Returns the device for `auto` (a GPU where there is one), `cpu` or `cuda`. Raises BackendUnavailable."""
    if name == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("device='cuda': torch finds no GPU; use device='cpu' or 'auto'")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def restore_for_evaluation(
    path: Path, *, route: str, ema: bool = True, device: str
) -> tuple[ModelSpec, nn.Module, torch.device, dict[str, Any]]:
    """As `load_predictor`, but returns the network itself, without its other routes, and the device it is on."""
    checkpoint = load_checkpoint(path)
    spec = ModelSpec.from_json(checkpoint["spec"], where=str(path))
    place = device_for(device)
    model = restore_model(checkpoint, path, bn=route, ema=ema).eval().to(place)
    sha256 = sha256_file(path)
    facts = {
        "kind": "checkpoint",
        "sha256": sha256,
        "size_bytes": path.stat().st_size,
        "precision": "fp32",
        "arch": spec.arch,
        "backend": f"torch {torch.__version__}",
        "device": place.type,
        "route": route,
        "weights": "moving average" if ema and checkpoint.get("ema_state_dict") else "last",
    }
    return dataclasses.replace(spec, route=route, checkpoint_sha256=sha256), model, place, facts
