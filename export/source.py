"""Load what an export needs from a checkpoint: the stock timm model, its spec and real images.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import resolve_model_data_config
from torch import nn

from calib.config import CalibrationConfig
from calib.images import calibration_set
from runtime.errors import CheckpointError, ConfigError, DataError
from runtime.preprocessing import decode_and_fit
from runtime.spec import ModelSpec, Preprocessing
from runtime.system.files import sha256_file
from runtime.system.image_sources import image_paths, open_source, spread
from train.checkpoint import FORMAT, check_checkpoint, describe, plain_state_dict, read_torch_file
from train.data import class_names, class_wnids
from train.dual_bn import select_route
from train.models import create_model, load_weights, restore_model
from train.recipes import MAIN

__all__ = ["Source", "load_source", "resized", "timm_spec", "with_unused_images"]

log = logging.getLogger(__name__)

_TIMM = "timm:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model to export."""

    model: nn.Module
    """The stock timm model with the main route's weights, on the CPU, in eval mode."""
    spec: ModelSpec
    """The model's description, with the checkpoint's hash."""
    images_NHWC: NDArray[np.uint8]
    """Real RGB images at the input size, for verification; N is 0 if there are none."""
    labels_N: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Their classes; empty if they are unknown."""


def load_source(
    source: str | Path,
    arch: str | None = None,
    *,
    weights: Path | None = None,
    route: str = MAIN,
    ema: bool = True,
    data: Path | None = None,
    size: tuple[int, int] | None = None,
    images: int = 64,
) -> Source:
    """Load a model to export, without its auxiliary BatchNorms.

    Args:
        source: an advprop checkpoint; a plain state dict of a timm model together with `arch`, with
            or without timm's split BatchNorms; or `timm:NAME`, e.g.
            `timm:tf_efficientnet_b3.ap_in1k`, whose weights timm downloads.
        arch: timm's name of the architecture; an advprop checkpoint contains it.
        weights: file with the weights of `timm:NAME` (default: timm downloads them).
        route: BatchNorm route to export. Auxiliary routes are for robustness studies.
        ema: prefer the moving average of the weights.
        data: folder of images to verify on, searched recursively (default: the sample in the
            checkpoint).
        size: input size, (height, width), to which the checkpoint's sample is resized (default: the
            checkpoint's).
        images: maximum number of images from `data`, evenly spaced.

    Raises:
        CheckpointError: the file is not a checkpoint, or its weights do not fit the architecture.
        ConfigError: there is no such route, or the arguments contradict each other.
        ArchError: timm does not have the architecture.
        BackendUnavailable: timm cannot download the weights.
        DataError: none of the images in `data` can be decoded.
    """
    name = str(source)
    labels_N = np.empty(0, np.int64)
    if name.startswith(_TIMM):
        model, spec, sha256 = _from_timm(name.removeprefix(_TIMM), arch, weights, route)
        sample_NHWC = _no_images(spec)
    else:
        if weights is not None:
            raise ConfigError(
                f"--weights requires timm:NAME; found {name}, which already holds the weights. Remove --weights"
            )
        path = Path(source)
        content = read_torch_file(path)
        sha256 = sha256_file(path)
        if isinstance(content, Mapping) and content.get("format") == FORMAT:
            model, spec, sample_NHWC = _from_checkpoint(path, check_checkpoint(content, path), arch, route, ema)
            labels_N = np.asarray(content["sample"].get("labels", ()), np.int64)
        else:
            model, spec = _from_state_dict(path, content, arch, route)
            sample_NHWC = _no_images(spec)
    spec = dataclasses.replace(spec, checkpoint_sha256=sha256, route=route)
    if size is not None:
        height, width = size
        preprocessing = dataclasses.replace(spec.preprocessing, height=height, width=width)
        spec = dataclasses.replace(spec, preprocessing=preprocessing)
        sample_NHWC = resized(sample_NHWC, size)
    if data is not None:
        sample_NHWC, labels_N = _load_images(data, spec.preprocessing, images), labels_N[:0]
    return Source(model=model.eval(), spec=spec, images_NHWC=sample_NHWC, labels_N=labels_N)


def _from_checkpoint(
    path: Path, checkpoint: dict[str, Any], arch: str | None, route: str, ema: bool
) -> tuple[nn.Module, ModelSpec, NDArray[np.uint8]]:
    spec = ModelSpec.from_json(checkpoint["spec"], where=str(path))
    if arch is not None and arch != spec.arch:
        raise CheckpointError(f"{path} is a checkpoint of {spec.arch}, but --arch is {arch}; remove --arch")
    return restore_model(checkpoint, path, bn=route, ema=ema), spec, checkpoint["sample"]["images"].numpy()


def _from_state_dict(path: Path, content: Any, arch: str | None, route: str) -> tuple[nn.Module, ModelSpec]:
    if arch is None:
        raise CheckpointError(
            f"{path} is not an advprop checkpoint: {describe(content)}; expected format {FORMAT!r}, or a plain "
            "state_dict together with --arch NAME"
        )
    weights = select_route(plain_state_dict(content, path), route)
    model = create_model(arch, num_classes=_count_classes(arch, weights, path))
    load_weights(model, weights, path, arch)
    log.warning("%s does not contain its preprocessing; using timm's default preprocessing of %s", path, arch)
    return model, timm_spec(model, arch)


def _from_timm(name: str, arch: str | None, weights: Path | None, route: str) -> tuple[nn.Module, ModelSpec, str]:
    """Return timm's pretrained model, its spec, and the SHA-256 of the file or of the tensors."""
    if arch is not None:
        raise ConfigError(f"{_TIMM}{name} already specifies the architecture; remove --arch")
    if weights is None:
        if route != MAIN:
            raise ConfigError(
                f"timm's weights have the BatchNorm route {MAIN} only; found --route {route}. Remove --route"
            )
        model = create_model(name, pretrained=True)
        return model, timm_spec(model, name), _sha256_of_weights(model)
    state = select_route(plain_state_dict(read_torch_file(weights), weights), route)
    model = create_model(name, num_classes=_count_classes(name, state, weights))
    load_weights(model, state, weights, name)
    return model, timm_spec(model, name), sha256_file(weights)


def timm_spec(model: nn.Module, arch: str) -> ModelSpec:
    """Return the spec that timm's configuration of the model describes.

    Published AdvProp weights (`.ap_in1k`) have a mean and standard deviation of 0.5.
    """
    config = resolve_model_data_config(model)
    classes = int(model.num_classes)  # type: ignore[arg-type]  # every timm classifier has it
    _, height, width = config["input_size"]
    return ModelSpec(
        arch=arch,
        classes=class_names(classes),
        wnids=class_wnids(classes),
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


def resized(images_NHWC: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize uint8 RGB images to `size`, (height, width), with PIL's bicubic filter."""
    height, width = size
    images = [
        np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)) for image in images_NHWC
    ]
    return np.stack(images) if images else np.empty((0, height, width, 3), np.uint8)


def with_unused_images(
    source: Source, data: Path, calibration: CalibrationConfig, count: int = 64
) -> tuple[Source, CalibrationConfig]:
    """Add images to verify on from a calibration set, which does not calibrate on them.

    Args:
        source: a model without images.
        data: source of the calibration images, as for `calib.calibrate_file`.
        calibration: its settings.
        count: maximum number of images; at most a quarter of all images.

    Returns:
        The model with images, and the settings with fewer calibration images if necessary.

    Raises:
        DataError: too few images can be used.
    """
    kinds = 1 if calibration.budget is None else 2  # a budget holds out as many images as calibrate
    chosen = None if data.suffix != ".json" else calibration_set(data)
    fitted: list[NDArray[np.uint8]] = []
    with open_source(data if chosen is None else chosen.source) as reader:
        names = list(reader.names)
        if chosen is None:
            kept = len(names) - min(count, len(names) // 4)
            calibration = dataclasses.replace(calibration, images=max(1, min(calibration.images, kept // kinds)))
            used = set(spread(names, kinds * calibration.images))
        else:
            used = {image.name for image in chosen.images}
        for name in spread([name for name in names if name not in used], count):
            try:
                fitted.append(decode_and_fit(reader.read(name), source.spec.preprocessing, reader.describe(name)))
            except DataError as error:
                log.warning("skipped: %s", error)
    if not fitted:
        raise DataError(
            f"{data} has {len(names)} images, too few to calibrate and to verify on others",
            fix="pass more images, or images to verify on with --data DIR",
        )
    log.info("verifying on %d images of %s that do not calibrate", len(fitted), data)
    return dataclasses.replace(source, images_NHWC=np.stack(fitted)), calibration


def _no_images(spec: ModelSpec) -> NDArray[np.uint8]:
    return np.empty((0, spec.preprocessing.height, spec.preprocessing.width, 3), np.uint8)


def _sha256_of_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def _classifier_name(model: nn.Module) -> str:
    name = model.pretrained_cfg["classifier"]  # type: ignore[index]  # a dict timm attaches
    return str(name if isinstance(name, str) else name[0])


def _count_classes(arch: str, weights: Mapping[str, torch.Tensor], path: Path) -> int:
    key = _classifier_name(create_model(arch)) + ".weight"
    if key not in weights:
        raise CheckpointError(f"{path} does not fit {arch}: it has no {key}. Check --arch")
    return int(weights[key].shape[0])


def _load_images(folder: Path, spec: Preprocessing, count: int) -> NDArray[np.uint8]:
    paths = image_paths(folder)
    fitted = []
    for path in spread(paths, count):
        try:
            fitted.append(decode_and_fit(path, spec))
        except DataError as error:
            log.warning("skipped: %s", error)
    if not fitted:
        raise DataError(f"--data {folder}: found {len(paths)} image files, none of which can be decoded")
    return np.stack(fitted)
