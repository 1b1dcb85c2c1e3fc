"""Initialize a network from a file of weights: checkpoints of ours and state dicts of other tools."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runtime.errors import CheckpointError, ConfigError, first_line
from runtime.spec import ModelSpec
from train.checkpoint import FORMAT, check_checkpoint, plain_state_dict, read_torch_file
from train.dual_bn import select_route
from train.models import classifier_prefixes, reset_classifier, route_weights
from train.recipes import MAIN

__all__ = ["Initialization", "initialize", "read_weights"]

log = logging.getLogger(__name__)

_MIN_SHARE = 0.9
"""Share of the network's tensors, without its classifier, that a file must contain."""
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class _FoundWeights:
    """The content of a file of weights."""

    tensors: dict[str, torch.Tensor]
    """Weights under the names of the stock timm model."""
    spec: ModelSpec | None
    """The description of the network, if the file is a checkpoint of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Initialization:
    """Which tensors of a network came from a file."""

    loaded: tuple[str, ...]
    """Names of the tensors that were loaded."""
    new_head: tuple[str, ...]
    """Tensors of the classifier that keep their random values: the file has other classes, or none."""
    missing: tuple[str, ...]
    """Other tensors of the network that the file does not contain, or contains in another shape."""
    unused: tuple[str, ...]
    """Tensors of the file that the network does not have."""

    def __str__(self) -> str:
        parts = [f"loaded {len(self.loaded)} tensors"]
        if self.missing:
            parts.append(f"{len(self.missing)} stay random ({_listed(self.missing)})")
        if self.unused:
            parts.append(f"{len(self.unused)} of the file are not used ({_listed(self.unused)})")
        return ", ".join(parts)


def read_weights(path: Path, route: str = MAIN) -> dict[str, torch.Tensor]:
    """Return the weights in a file under the names of the stock timm model.

    Args:
        path: an advprop checkpoint; or a state dict as `.safetensors`, `.pt` or `.pth`, which may
            be nested (`state_dict`, `model`, `model_ema`, …) and may have the prefixes of wrapped
            networks. A moving average is preferred.
        route: BatchNorm route to read.

    Raises:
        CheckpointError: the file is missing, damaged, holds code or has no weights.
        ConfigError: the file has no such route.
    """
    return _read(path, route).tensors


def _read(path: Path, route: str) -> _FoundWeights:
    if path.is_dir():
        raise CheckpointError(
            f"--weights {path} is a folder; expected a file of weights",
            fix=f"pass the file, such as --weights {path / 'best.pt'}",
        )
    if path.suffix.lower() == ".safetensors":
        content: Any = _read_safetensors(path)
    else:
        content = read_torch_file(path)
    try:
        if isinstance(content, Mapping) and content.get("format") == FORMAT:
            checkpoint = check_checkpoint(content, path)
            spec = ModelSpec.from_json(checkpoint["spec"], where=str(path))
            return _FoundWeights(tensors=route_weights(checkpoint, bn=route), spec=spec)
        return _FoundWeights(tensors=select_route(plain_state_dict(content, path), route), spec=None)
    except ConfigError as error:
        raise ConfigError(f"--weights {path}: {error}", fix="choose a route with --set init_route=NAME") from error


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointError(f"no such file of weights: {path}")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a complete .safetensors file ({first_line(error)})", fix="copy or download it again"
        ) from error


def initialize(model: nn.Module, path: Path, arch: str, classes: Sequence[str], route: str = MAIN) -> Initialization:
    """Load the weights of a file into a network, in place, and log what was loaded.

    The classifier keeps its random weights if the file has another number of classes.

    Args:
        model: timm's model without auxiliary BatchNorms.
        path: see `read_weights`.
        arch: the model's name, for messages.
        classes: names of the model's classes.
        route: BatchNorm route of the file.

    Raises:
        CheckpointError: see `read_weights`; also if the file belongs to another architecture or
            has less than 90% of the network's tensors.
        ConfigError: the file has no such route.
    """
    found = _read(path, route)
    if found.spec is not None and _base_name(found.spec.arch) != _base_name(arch):
        raise CheckpointError(
            f"--weights {path} is a checkpoint of {found.spec.arch}; expected {arch}",
            fix=f"train with --arch {found.spec.arch}, or start from weights of {arch}",
        )
    own = model.state_dict()
    head = [name for name in own if name.startswith(classifier_prefixes(model))]
    loaded = [name for name, value in found.tensors.items() if name in own and own[name].shape == value.shape]
    _check_share(own, head, found.tensors, loaded, path, arch)
    if any(name not in loaded for name in head):
        loaded = [name for name in loaded if name not in head]
        reset_classifier(model)
    model.load_state_dict({name: found.tensors[name] for name in loaded}, strict=False)
    result = Initialization(
        loaded=tuple(loaded),
        new_head=tuple(name for name in head if name not in loaded),
        missing=tuple(name for name in _counted(own) if name not in loaded and name not in head),
        unused=tuple(name for name in found.tensors if name not in own),
    )
    log.info("--weights %s: %s", path, result)
    _report_head(result, found, path, classes)
    return result


def _check_share(
    own: Mapping[str, torch.Tensor],
    head: Collection[str],
    found: Mapping[str, torch.Tensor],
    loaded: Collection[str],
    path: Path,
    arch: str,
) -> None:
    """Raise CheckpointError if a file has too few of the network's tensors."""
    expected = [name for name in _counted(own) if name not in head]
    fitting = [name for name in expected if name in loaded]
    if len(fitting) >= _MIN_SHARE * len(expected):
        return
    other_shapes = [
        f"{name} is {tuple(found[name].shape)} in the file and {tuple(own[name].shape)} in {arch}"
        for name in expected
        if name in found and name not in fitting
    ]
    examples = f"; {other_shapes[0]}" if other_shapes else ""
    raise CheckpointError(
        f"--weights {path} does not fit {arch}: {len(fitting)} of its {len(expected)} tensors (without the "
        f"classifier) are in the file. The file has {len(found)} tensors ({_listed(list(found))}); expected names such "
        f"as {_listed(expected)}{examples}",
        fix="pass the architecture of the file with --arch, or another file",
    )


def _report_head(result: Initialization, found: _FoundWeights, path: Path, classes: Sequence[str]) -> None:
    """Report a classifier that starts from random weights, or from those of other classes."""
    if result.new_head:
        sizes = [found.tensors[name].shape[0] for name in result.new_head if name in found.tensors]
        log.info(
            "the classifier (%s) starts from random weights: the file has %s, and the images have %d classes",
            _listed(result.new_head),
            f"{sizes[0]} classes" if sizes else "none",
            len(classes),
        )
        return
    before = () if found.spec is None else found.spec.classes
    other = [pair for pair in zip(before, classes, strict=False) if pair[0] != pair[1]]
    if other:
        log.warning(
            "--weights %s has other classes: %s. The classifier starts with the weights of those classes; the number "
            "and the order of classes must match",
            path,
            ", ".join(f"found {old}, expected {new}" for old, new in other[:3]) + (", …" if len(other) > 3 else ""),
        )


def _counted(names: Collection[str]) -> list[str]:
    """Return the names without the counters of BatchNorms, which many files do not contain."""
    return [name for name in names if not name.endswith("num_batches_tracked")]


def _base_name(arch: str) -> str:
    return arch.split(".", 1)[0]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
