"""What is exported: a checkpoint becomes a stock timm model, its spec and real images.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data import resolve_model_data_config
from torch import nn

from runtime.errors import CheckpointError, DataError
from runtime.files import sha256_file
from runtime.images import SUFFIXES, decode, fit_to_input
from runtime.spec import ModelSpec, Preprocessing
from train.checkpoint import FORMAT, check_checkpoint, describe, read_torch_file
from train.data import class_names, spread
from train.dual_bn import strip_auxiliary
from train.models import create_model
from train.restore import load_weights, restore_model

__all__ = ["Source", "load_source"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model to export."""

    model: nn.Module
    """The stock timm model with the main route's weights, on the CPU, in eval mode."""
    spec: ModelSpec
    """The model's description, with the checkpoint's hash."""
    images_NHWC: NDArray[np.uint8]
    """Real images at the input size, RGB, to verify on; N is 0 where there are none."""


def load_source(checkpoint: Path, arch: str | None = None, data: Path | None = None, images: int = 64) -> Source:
    """Reads a checkpoint and strips its auxiliary BatchNorms.

    Args:
        checkpoint: one of ours, or a plain state dict of a timm model (then give `arch`).
        arch: timm's name of the architecture; for one of ours, only checked against it.
        data: folder of images, searched recursively, to verify on instead of the
            checkpoint's own sample.
        images: the most images to take from `data`, spread evenly over it.

    Raises:
        CheckpointError: not a checkpoint, or its weights do not fit the architecture.
        ArchError: timm does not have the architecture.
        DataError: `data` has no image that can be decoded.
    """
    content = read_torch_file(checkpoint)
    if isinstance(content, Mapping) and content.get("format") == FORMAT:
        model, spec, sample_NHWC = _from_ours(checkpoint, check_checkpoint(content, checkpoint), arch)
    else:
        model, spec, sample_NHWC = _from_state_dict(checkpoint, content, arch)
    spec = dataclasses.replace(spec, checkpoint_sha256=sha256_file(checkpoint))
    if data is not None:
        sample_NHWC = _images(data, spec.preprocessing, images)
    return Source(model=model.eval(), spec=spec, images_NHWC=sample_NHWC)


def _from_ours(
    path: Path, checkpoint: dict[str, Any], arch: str | None
) -> tuple[nn.Module, ModelSpec, NDArray[np.uint8]]:
    spec = ModelSpec.from_json(checkpoint["spec"], where=str(path))
    if arch is not None and arch != spec.arch:
        raise CheckpointError(f"{path} holds {spec.arch}, but --arch {arch} was given; leave --arch out")
    return restore_model(checkpoint, path), spec, checkpoint["sample"]["images"].numpy()


def _from_state_dict(path: Path, content: Any, arch: str | None) -> tuple[nn.Module, ModelSpec, NDArray[np.uint8]]:
    # timm's and torch's training scripts nest the weights under one of these keys.
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    plain = isinstance(content, Mapping) and content and all(torch.is_tensor(value) for value in content.values())
    if not plain or arch is None:
        raise CheckpointError(
            f"{path} is not an advprop checkpoint: {describe(content)}; expected format {FORMAT!r}, or a plain "
            "state_dict together with --arch NAME"
        )
    weights = strip_auxiliary({key.removeprefix("module."): value for key, value in content.items()})
    model = create_model(arch, num_classes=_classes(arch, weights, path))
    load_weights(model, weights, path, arch)
    config = resolve_model_data_config(model)
    _, height, width = config["input_size"]
    spec = ModelSpec(
        arch=arch,
        classes=class_names(weights[_classifier(model) + ".weight"].shape[0]),
        preprocessing=Preprocessing(
            height=height,
            width=width,
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
        ),
    )
    log.warning("%s does not say how it was trained: preprocessing is timm's for %s", path, arch)
    return model, spec, np.empty((0, height, width, 3), np.uint8)


def _classifier(model: nn.Module) -> str:
    name = model.pretrained_cfg["classifier"]  # type: ignore[index]  # a dict timm attaches
    return str(name if isinstance(name, str) else name[0])


def _classes(arch: str, weights: Mapping[str, torch.Tensor], path: Path) -> int:
    key = _classifier(create_model(arch)) + ".weight"
    if key not in weights:
        raise CheckpointError(f"{path} does not fit {arch}: it has no {key}; is --arch right?")
    return int(weights[key].shape[0])


def _images(folder: Path, spec: Preprocessing, count: int) -> NDArray[np.uint8]:
    if not folder.is_dir():
        raise DataError(f"--data {folder}: no such folder")
    paths = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    fitted = []
    for path in spread(paths, count):
        try:
            fitted.append(fit_to_input(decode(path), spec))
        except DataError as error:
            log.warning("skipped: %s", error)
    if not fitted:
        raise DataError(f"--data {folder}: found {len(paths)} image files, none of which can be decoded")
    return np.stack(fitted)
