"""Streaming histograms of magnitudes: any number of images, constant memory, the same result in any order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["BINS", "Histogram"]

BINS = 4096
"""Of which at least half are in use: the range is the power of two above the largest magnitude."""
_SMALLEST_TOP = 2.0**-100
"""So that bins have a width that float32 can hold; nothing smaller matters."""


class Histogram:
    """How often a tensor had which magnitude.

    The range is a power of two. When a larger value comes, it doubles and neighboring bins merge, so
    the counts are the same whatever the order and the batches of the images.
    """

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)
        """Elements a bin, (BINS,); bin i is of magnitudes from i to i + 1 `width`s."""
        self.top = 0.0
        """Upper end of the range; 0 before any value but zeros."""
        self.amax = 0.0
        """Largest magnitude, exactly."""
        self.zeros = 0
        """Zeros that came before the range was known."""

    @property
    def width(self) -> float:
        """Width of a bin."""
        return self.top / BINS

    @property
    def centers(self) -> NDArray[np.float64]:
        """The magnitude in the middle of each bin, (BINS,)."""
        middles: NDArray[np.float64] = (np.arange(BINS, dtype=np.float64) + 0.5) * self.width
        return middles

    def add(self, values: NDArray[np.float32]) -> None:
        """Counts `values`, of any shape. Raises ValueError where one is not finite."""
        magnitudes = np.abs(values).ravel()
        largest = float(magnitudes.max(initial=0.0))
        if not np.isfinite(largest):
            raise ValueError("not finite")
        if largest == 0.0 and self.top == 0.0:
            self.zeros += magnitudes.size
            return
        self._cover(largest)
        magnitudes *= np.float32(BINS / self.top)
        bins = magnitudes.astype(np.int32)
        self.counts += np.bincount(bins, minlength=BINS)
        self.amax = max(self.amax, largest)

    def _cover(self, largest: float) -> None:
        if self.top == 0.0:
            self.top = max(2.0 ** (np.floor(np.log2(largest)) + 1), _SMALLEST_TOP)
            self.counts[0] += self.zeros
            self.zeros = 0
        while self.top <= largest:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2, np.int64)])
            self.top *= 2
