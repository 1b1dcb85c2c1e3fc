"""Compare our corruptions with stored outputs of the original code.

The reference file holds outputs at 224 pixels: arrays `clean/J` and `CORRUPTION/SEVERITY/J`,
computed after `np.random.seed(100 * J + SEVERITY)`. The random numbers of the original code can
therefore be replayed, and random corruptions can be compared pixel by pixel. The exception is
impulse noise, which the original code draws from another generator without a seed. Our own random
numbers are compared by the statistics of eight draws per image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.evaluate.corruptions import TABLES, corrupt
from runtime.evaluate.corruptions.corrupt import DETERMINISTIC, FUNCTIONS

SEVERITIES = (1, 3, 5)
"""Severities in the reference file."""
IMAGES = (0, 1)
"""Images in the reference file."""


class Replay:
    """NumPy's legacy generator, as in the original code, with the methods of the new one."""

    def __init__(self, seed: int) -> None:
        self.legacy = np.random.RandomState(seed)

    def standard_normal(self, size: Any, dtype: Any = np.float64) -> NDArray[Any]:
        return self.legacy.normal(size=size).astype(dtype)

    def random(self, size: Any, dtype: Any = np.float64) -> NDArray[Any]:
        return self.legacy.random_sample(size).astype(dtype)

    def uniform(self, low: float, high: float, size: Any = None) -> Any:
        return self.legacy.uniform(low, high, size)

    def integers(self, low: int, high: int, size: Any = None) -> Any:
        return self.legacy.randint(low, high, size=size)

    def poisson(self, means: NDArray[np.float64]) -> NDArray[Any]:
        return self.legacy.poisson(means)


def replayed(image_HWC: NDArray[np.uint8], name: str, severity: int, seed: int) -> NDArray[np.uint8]:
    """Apply our corruption with the original code's random numbers after `np.random.seed(seed)`."""
    arguments = TABLES["imagenet"][name][severity - 1]
    random = {} if name in DETERMINISTIC else {"random": Replay(seed)}
    return FUNCTIONS[name](image_HWC, *arguments, **random)


class Statistics:
    """Sums over images of the difference from the clean image."""

    def __init__(self) -> None:
        self.magnitude = 0.0
        self.spread = np.zeros(3)
        self.count = 0

    def add(self, image_HWC: NDArray[np.uint8], clean_HWC: NDArray[np.uint8]) -> None:
        difference = image_HWC.astype(np.float64) - clean_HWC
        self.magnitude += np.abs(difference).mean()
        self.spread += difference.std(axis=(0, 1))
        self.count += 1

    def relative_to(self, other: Statistics) -> tuple[float, float]:
        """Return two ratios: of the mean magnitude, and of the standard deviation of a channel.

        The channel is the one whose ratio is farthest from 1.
        """
        share = other.count / self.count
        spreads = self.spread / other.spread * share
        return self.magnitude / other.magnitude * share, float(spreads[np.abs(spreads - 1).argmax()])


def compare(reference: Mapping[str, NDArray[np.uint8]], name: str, severity: int, draws: int = 8) -> dict[str, Any]:
    """Compare one corruption at one severity over both images.

    Returns:
        `levels`: maximum difference from the reference when its random numbers are replayed;
        `same`: share of equal values; `replay` and `own`: (magnitude, standard deviation) relative
        to the reference, with replayed and with our own random numbers; `noise`: standard deviation
        of the magnitude between our draws over both images, relative to its mean.
    """
    theirs, ours, replay = Statistics(), Statistics(), Statistics()
    single = np.zeros((draws, len(IMAGES)))
    levels, same = 0, 0.0
    for j in IMAGES:
        clean, expected = reference[f"clean/{j}"], reference[f"{name}/{severity}/{j}"]
        theirs.add(expected, clean)
        found = replayed(clean, name, severity, 100 * j + severity)
        replay.add(found, clean)
        distance = np.abs(found.astype(int) - expected)
        levels, same = max(levels, int(distance.max())), same + float((distance == 0).mean()) / len(IMAGES)
        for draw in range(draws):
            before = ours.magnitude
            ours.add(corrupt(clean, name, severity, key=f"{j}/{draw}"), clean)
            single[draw, j] = ours.magnitude - before
    totals = single.sum(axis=1)
    return {
        "levels": levels,
        "same": same,
        "replay": replay.relative_to(theirs),
        "own": ours.relative_to(theirs),
        "noise": float(totals.std() / totals.mean()),
    }
