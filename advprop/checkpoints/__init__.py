"""A training checkpoint as something to evaluate, attack with, time or describe.

The functions import torch and timm when they are called. They are defined at the top level of this
module, so that worker processes can import them by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import BackendUnavailable

if TYPE_CHECKING:
    from advprop.checkpoints.predictor import Predict
    from advprop.checkpoints.torch_peer import EagerModel
    from runtime.evaluate.attacks.methods import Craft
    from runtime.spec import ModelSpec

__all__ = ["load_attacker", "load_predictor", "open_torch_peer"]


@contextmanager
def _torch_needed_for(purpose: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise BackendUnavailable(f"{purpose} needs torch and timm ({error}); install them") from error


def load_predictor(
    path: Path, *, route: str = "main", device: str = "auto"
) -> tuple[ModelSpec, Predict, bool, dict[str, Any]]:
    """Load a checkpoint for evaluation; see `advprop.checkpoints.predictor`."""
    with _torch_needed_for(f"evaluating the checkpoint {path}"):
        from advprop.checkpoints import predictor
    return predictor.load_predictor(path, route=route, device=device)


def load_attacker(path: Path, *, route: str = "main", device: str = "auto") -> tuple[ModelSpec, Craft, dict[str, Any]]:
    """Load a checkpoint to attack with; see `advprop.checkpoints.attacker`."""
    with _torch_needed_for(f"attacking with the checkpoint {path}"):
        from advprop.checkpoints import attacker
    return attacker.load_attacker(path, route=route, device=device)


def open_torch_peer(
    spec: ModelSpec | None, *, checkpoint: Path | None, half: bool, device: str, threads: int
) -> tuple[ModelSpec, list[tuple[str, EagerModel]]]:
    """Open a network in PyTorch to measure its latency; see `advprop.checkpoints.torch_peer`."""
    with _torch_needed_for("running a network in PyTorch"):
        from advprop.checkpoints import torch_peer
    return torch_peer.open_eager(spec, checkpoint=checkpoint, half=half, device=device, threads=threads)
