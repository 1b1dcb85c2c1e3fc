"""Training checkpoints for the tools: evaluate one, attack with one, time one, describe one.

The runtime cannot load checkpoints; these functions are passed to it as loaders. Each returns the
spec of the checkpoint, a function or network, and facts (plain values) that results record.

    load_predictor       images → logits, for `runtime.evaluate`
    load_attacker        images → adversarial images, for `runtime.evaluate.attacks`
    open_torch_peer      a network to time, for `runtime.bench`
    describe_checkpoint  facts for `advprop inspect`

This module can be imported without torch; its functions need torch and timm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime.errors import BackendUnavailable, CheckpointError
from runtime.spec import ModelSpec
from train.recipes import MAIN

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from advprop.checkpoints.torch_peer import TorchModel
    from runtime.evaluate.attacks.methods import Craft

__all__ = [
    "LoadedAttacker",
    "LoadedPredictor",
    "TorchPeers",
    "describe_checkpoint",
    "load_attacker",
    "load_predictor",
    "open_torch_peer",
]


class LoadedPredictor(NamedTuple):
    """A checkpoint to evaluate."""

    spec: ModelSpec
    """Description of the network."""
    predict: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    """Normalized images, (N, 3, H, W) → logits, (N, K)."""
    accepts_any_size: bool
    """Whether the network accepts image sizes other than the spec's."""
    facts: dict[str, Any]
    """Facts that results record: `sha256`, `device`, `route`, …"""


class LoadedAttacker(NamedTuple):
    """A checkpoint whose gradient creates adversarial images."""

    spec: ModelSpec
    """Description of the network."""
    craft: Craft
    """Creates adversarial images."""
    facts: dict[str, Any]
    """Facts that results record: `sha256`, `device`, `route`, …"""


class TorchPeers(NamedTuple):
    """A PyTorch network to time."""

    spec: ModelSpec
    """Description of the network."""
    models: list[tuple[str, TorchModel]]
    """(suffix of the name, model): the network in eager mode and, on a GPU, compiled."""


def load_predictor(path: Path, *, route: str = MAIN, ema: bool = True, device: str = "auto") -> LoadedPredictor:
    """Load a checkpoint for evaluation in float32.

    Args:
        path: an advprop checkpoint.
        route: BatchNorm route to evaluate.
        ema: prefer the moving average of the weights.
        device: torch device, or `auto` for a GPU if one is available.

    Raises:
        CheckpointError: the file is not an advprop checkpoint.
        ConfigError: the checkpoint has no such route, or torch does not know the device.
        BackendUnavailable: torch, timm or the GPU is missing.
    """
    with _require_torch(f"evaluating the checkpoint {path}", "evaluate its ONNX file"):
        from advprop.checkpoints import predictor
    return predictor.load_predictor(path, route=route, ema=ema, device=device)


def load_attacker(path: Path, *, route: str = MAIN, device: str = "auto") -> LoadedAttacker:
    """Load a checkpoint whose gradient creates adversarial images.

    Args:
        path: an advprop checkpoint.
        route: BatchNorm route that the gradient goes through.
        device: torch device, or `auto` for a GPU if one is available.

    Raises:
        CheckpointError: the file is not an advprop checkpoint.
        ConfigError: the checkpoint has no such route, or torch does not know the device.
        BackendUnavailable: torch, timm or the GPU is missing.
    """
    with _require_torch(f"attacking with the gradient of {path}", "run Square attack and noise without --checkpoint"):
        from advprop.checkpoints import attacker
    return attacker.load_attacker(path, route=route, device=device)


def open_torch_peer(
    spec: ModelSpec | None, *, checkpoint: Path | None, half: bool, device: str, threads: int
) -> TorchPeers:
    """Create a PyTorch network to time, and on a GPU a compiled copy of it.

    Args:
        spec: architecture, classes and input size of a network with random weights; ignored if
            a checkpoint is given.
        checkpoint: an advprop checkpoint, whose spec and weights are used.
        half: compute in FP16 on a GPU; a CPU always computes in FP32.
        device: torch device, or `auto` for a GPU if one is available.
        threads: CPU threads per operator, for the whole process; 0 keeps PyTorch's default.

    Raises:
        CheckpointError: the file is not an advprop checkpoint.
        ArchError: timm does not have the architecture.
        ConfigError: neither a spec nor a checkpoint is given, or torch does not know the device.
        BackendUnavailable: torch, timm or the GPU is missing.
    """
    with _require_torch("timing a network in PyTorch", "time model files only"):
        from advprop.checkpoints import torch_peer
    return torch_peer.open_torch_peer(spec, checkpoint=checkpoint, half=half, device=device, threads=threads)


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """Return the facts about a checkpoint that `advprop inspect` shows, by their labels.

    The value of `spec` is a ModelSpec, all others are strings. The data of tensors is not read.

    Raises:
        CheckpointError: the file is not an advprop checkpoint.
        BackendUnavailable: torch or timm is missing.
    """
    with _require_torch(f"reading the checkpoint {path}", "inspect its ONNX file"):
        from train.checkpoint import load_checkpoint
        from train.dual_bn import auxiliary_routes, strip_auxiliary
        from train.reporting import EpochMetrics, best_epoch
    content = load_checkpoint(path, device="meta")
    weights = content["state_dict"]
    main, total = (sum(tensor.numel() for tensor in part.values()) for part in (strip_auxiliary(weights), weights))
    facts = {
        "kind": f"advprop checkpoint, {path.stat().st_size / 1e6:.1f} MB",
        "weights": f"{main:,} for inference, {total - main:,} auxiliary",
        "BatchNorm routes": ", ".join([MAIN, *auxiliary_routes(weights)]),
        "moving average": "yes" if content.get("ema_state_dict") else "none",
        "trained for": f"{content['epoch']} epochs, {content['step']} steps",
    }
    try:
        rows = [EpochMetrics(**row) for row in content.get("metrics") or ()]
        if rows:
            best = best_epoch(rows)
            facts["best epoch"] = f"{best.epoch}: clean {best.top1:.1%}, under attack {best.top1_attacked:.1%}"
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: invalid metrics ({error})") from error
    return {**facts, "spec": ModelSpec.from_json(content["spec"], where=str(path))}


@contextmanager
def _require_torch(purpose: str, alternative: str) -> Iterator[None]:
    """Turn the ImportError of a missing package into BackendUnavailable."""
    try:
        yield
    except ImportError as error:
        raise BackendUnavailable(
            f"{purpose} needs torch and timm ({error}): pip install torch timm, or {alternative}"
        ) from error
