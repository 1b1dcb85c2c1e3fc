"""Attacks by a checkpoint's gradient, shown to models that have none.

Shape suffixes: A attacked copies of each image, N images, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.backends.open import ENGINE_SUFFIXES
from runtime.errors import CheckpointError
from runtime.evaluate.attacks.target import Victim
from runtime.spec import ModelSpec
from runtime.system.lazy import elsewhere

__all__ = ["ATTACKER_LOADER", "Attacker", "Craft", "load_attacker", "transfer"]

ATTACKER_LOADER = "advprop.checkpoints.attacker:load_attacker"
"""What attacks checkpoints: imported when there is one, since the runtime depends on nothing else of ours."""


class Craft(Protocol):
    """Makes adversarial images."""

    def __call__(
        self,
        attack: str,
        images_NHWC: NDArray[np.uint8],
        labels_N: NDArray[np.int64],
        *,
        radius: int,
        seeds: Sequence[int],
        steps: int,
        restarts: int,
    ) -> NDArray[np.uint8]:
        """Returns attacked copies, (A, N, H, W, C), uint8, rounded, within `radius` gray levels.

        `seeds` has one for each image: what is drawn for it follows from its own alone.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Attacker:
    """A checkpoint, as something that attacks."""

    name: str
    spec: ModelSpec
    craft: Craft
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What a result says of it; `sha256` of its file among them."""


def load_attacker(path: Path, *, route: str = "main", device: str = "auto") -> Attacker:
    """Loads a checkpoint to attack with.

    Args:
        path: one of our checkpoints.
        route: the BatchNorm route that its gradient goes through.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        CheckpointError: a model file, which has no gradient, or no checkpoint at all.
        BackendUnavailable: torch is missing, or a GPU.
    """
    if path.suffix in (".onnx", *ENGINE_SUFFIXES):
        raise CheckpointError(
            f"{path} is a model file, and has no gradient; --checkpoint wants the checkpoint that it was made from, "
            "such as best.pt"
        )
    purpose = f"attacking the checkpoint {path} by its gradient"
    loader = elsewhere(ATTACKER_LOADER, purpose, "leave --checkpoint out for Square attack and noise alone")
    spec, craft, facts = loader(path, route=route, device=device)
    return Attacker(name=f"{path.stem}.{route}", spec=spec, craft=craft, facts=facts)


def transfer(victim: Victim, attacked_ANHWC: NDArray[np.uint8], tick: Callable[[float], None]) -> None:
    """Shows the model one attacked copy after the other, of the images that still stand."""
    for number, attacked_NHWC in enumerate(attacked_ANHWC):
        rows = victim.rows
        victim.ask(attacked_NHWC[rows], rows)
        tick((number + 1) / len(attacked_ANHWC))
