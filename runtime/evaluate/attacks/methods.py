"""The attacks: Square attack, random noise as a control, and the transfer of gradient attacks.

Square attack needs only logits. Source: Andriushchenko, Croce, Flammarion and Hein, "Square Attack:
a query-efficient black-box adversarial attack via random search" (ECCV 2020), algorithms 1 and 2.
It starts with vertical stripes of ±ε. Each further query tries one square of ±ε per channel at a
random position, and keeps it if the margin gets smaller.

PGD and APGD follow the gradient of a checkpoint. The runtime has no gradients, so the caller passes
a loader that creates their images. Every model is then evaluated on these images.

Shape suffixes: A attacked copies of each image, N images, M selected images, H height, W width,
C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.backends.open import ENGINE_SUFFIXES
from runtime.errors import CheckpointError
from runtime.evaluate.attacks.config import INITIAL_SHARE
from runtime.evaluate.attacks.target import AttackTarget, bounds
from runtime.evaluate.names import ModelPath
from runtime.spec import ModelSpec
from runtime.system.seeding import seed_from

__all__ = [
    "Attacker",
    "AttackerLoader",
    "Craft",
    "image_generator",
    "image_seed",
    "load_attacker",
    "noise",
    "square",
    "square_share",
    "transfer",
]

Progress = Callable[[float], None]
"""Called with the completed share of an attack, from 0 to 1."""

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Numbers of queries, out of 10,000, after which the squares' share of the pixels is halved."""


def image_seed(seed: int, name: str, attack: str, epsilon: float) -> int:
    """Return the 128-bit seed of one image, equal in any process and on any machine.

    It makes the random numbers of an image independent of the other images in its batch.

    Args:
        seed: seed of the run.
        name: identifies the image.
        attack: name of the attack.
        epsilon: in 1/255.
    """
    return seed_from(int(seed), name, attack, float(epsilon))


def image_generator(seed: int) -> np.random.Generator:
    """Return the random generator of a seed."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed)))


def noise(target: AttackTarget, generators_N: Sequence[np.random.Generator], *, draws: int, progress: Progress) -> None:
    """Change every value of every pixel by +ε or −ε at random, several times.

    This is the control: an attack that fools no more images than random noise is ineffective. With
    random signs, every change has the maximum size ε, as in Square attack.

    Args:
        target: the model and images; it records the outcome.
        generators_N: one random generator per image.
        draws: maximum number of draws per image; an image that fools the model is not drawn again.
        progress: called after each draw.
    """
    lowest_NHWC, highest_NHWC = bounds(target.clean_NHWC, target.radius)
    for number in range(draws):
        remaining = target.remaining
        if not len(remaining):
            break
        shape = target.clean_NHWC.shape[1:]
        up_MHWC = np.stack([generators_N[index].integers(0, 2, shape, np.uint8) for index in remaining]).astype(bool)
        target.query(np.where(up_MHWC, highest_NHWC[remaining], lowest_NHWC[remaining]), remaining)
        progress((number + 1) / draws)


def square(
    target: AttackTarget,
    generators_N: Sequence[np.random.Generator],
    *,
    queries: int,
    initial_share: float = INITIAL_SHARE,
    progress: Progress,
) -> None:
    """Run Square attack on each image until it fools the model or has had `queries` queries.

    Args:
        target: the model and images; it records the outcome.
        generators_N: one random generator per image.
        queries: maximum number of queries per image, including the one for the stripes.
        initial_share: share of the pixels in the first squares.
        progress: called after each query.
    """
    clean_NHWC = target.clean_NHWC
    lowest_NHWC, highest_NHWC = bounds(clean_NHWC, target.radius)
    best_NHWC = _stripes(lowest_NHWC, highest_NHWC, generators_N)
    remaining = target.remaining
    margin_N = np.full(len(clean_NHWC), np.inf)
    margin_N[remaining] = target.query(best_NHWC[remaining], remaining)
    _, height, width, _ = clean_NHWC.shape
    for query in range(queries - 1):
        remaining = target.remaining
        if not len(remaining):
            break
        # A square has at least one pixel and is smaller than the image.
        side = round(math.sqrt(square_share(query, queries, initial_share) * height * width))
        side = min(max(side, 1), max(min(height, width) - 1, 1))
        tried_MHWC = best_NHWC[remaining]
        for image_HWC, index in zip(tried_MHWC, remaining, strict=True):
            _place_square(image_HWC, lowest_NHWC[index], highest_NHWC[index], side, generators_N[index])
        found_M = target.query(tried_MHWC, remaining)
        better_M = found_M < margin_N[remaining]
        margin_N[remaining[better_M]] = found_M[better_M]
        best_NHWC[remaining[better_M]] = tried_MHWC[better_M]
        progress((query + 2) / queries)


def square_share(query: int, queries: int, initial: float = INITIAL_SHARE) -> float:
    """Return a square's share of the pixels: the schedule of the paper, scaled to `queries`.

    Args:
        query: number of squares tried so far.
        queries: maximum number of queries.
        initial: share of the first squares.
    """
    position = 10_000 * query // queries
    return initial / 2.0 ** sum(position > after for after in _HALVINGS)


def _stripes(
    lowest_NHWC: NDArray[np.uint8], highest_NHWC: NDArray[np.uint8], generators_N: Sequence[np.random.Generator]
) -> NDArray[np.uint8]:
    """Set every column of every channel to its highest or its lowest values at random."""
    _, _, width, channels = lowest_NHWC.shape
    up_N1WC = np.stack([draw.integers(0, 2, (1, width, channels)) for draw in generators_N]).astype(bool)
    return np.where(up_N1WC, highest_NHWC, lowest_NHWC)


def _place_square(
    image_HWC: NDArray[np.uint8],
    lowest_HWC: NDArray[np.uint8],
    highest_HWC: NDArray[np.uint8],
    side: int,
    generator: np.random.Generator,
) -> None:
    """Set a random square to the highest or lowest values of each channel, in place."""
    height, width, channels = image_HWC.shape
    top, left = generator.integers(0, height - side + 1), generator.integers(0, width - side + 1)
    window = np.s_[top : top + side, left : left + side]
    before, low, high = image_HWC[window].copy(), lowest_HWC[window], highest_HWC[window]
    while True:
        # As in the authors' code, a square that changes nothing is drawn again instead of queried.
        # Some choice always changes something, because ε is at least one gray level.
        image_HWC[window] = np.where(generator.integers(0, 2, channels).astype(bool), high, low)
        if not np.array_equal(image_HWC[window], before):
            return


class Craft(Protocol):
    """Creates adversarial images with PGD or APGD."""

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
        """Return attacked copies, (A, N, H, W, C), uint8, rounded, within `radius` gray levels.

        `seeds` has one seed per image; the random numbers of an image depend only on its own seed.
        """


class AttackerLoader(Protocol):
    """Loads the attacker from a checkpoint, such as `advprop.checkpoints.load_attacker`."""

    def __call__(self, path: Path, *, route: str, device: str) -> tuple[ModelSpec, Craft, dict[str, Any]]:
        """Return the checkpoint's spec, the function that creates images, and facts for results."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attacker:
    """A checkpoint whose gradient creates adversarial images."""

    name: str
    spec: ModelSpec
    craft: Craft
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Facts that a result records, such as the `sha256` of the file."""


def load_attacker(
    path: Path, *, checkpoint_loader: AttackerLoader, route: str = "main", device: str = "auto"
) -> Attacker:
    """Load a checkpoint whose gradient creates adversarial images.

    Args:
        path: an advprop checkpoint.
        checkpoint_loader: loads it, such as `advprop.checkpoints.load_attacker`.
        route: BatchNorm route that the gradient follows.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        CheckpointError: the file is a model file, which has no gradient, or not a checkpoint.
        BackendUnavailable: torch or a GPU is missing.
    """
    if path.suffix in (".onnx", *ENGINE_SUFFIXES):
        raise CheckpointError(
            f"{path} is a model file, which has no gradient; pass --checkpoint the checkpoint that it was exported "
            "from, such as best.pt"
        )
    spec, craft, facts = checkpoint_loader(path, route=route, device=device)
    return Attacker(name=ModelPath(path=path).default_name(route), spec=spec, craft=craft, facts=facts)


def transfer(target: AttackTarget, attacked_ANHWC: NDArray[np.uint8], progress: Progress) -> None:
    """Query the model with each adversarial copy of the images that do not fool it yet."""
    for number, attacked_NHWC in enumerate(attacked_ANHWC):
        remaining = target.remaining
        target.query(attacked_NHWC[remaining], remaining)
        progress((number + 1) / len(attacked_ANHWC))
