"""Histogram → the magnitude that INT8's 127 stands for. Pure functions.

A value x becomes round(x / s) clipped to ±127, s = threshold / 127. A lower threshold has finer steps
and clips more.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from calib.histograms import BINS, Histogram

__all__ = ["LEVELS", "METHODS", "entropy", "minmax", "mse", "percentile", "quantization_errors"]

LEVELS = 127
"""Steps on each side of zero."""
_CANDIDATES = 256
_FIRST = 128
"""The narrowest range that `entropy` tries, in bins: one a level."""


def minmax(histogram: Histogram) -> float:
    """The largest magnitude: nothing is clipped."""
    return histogram.amax


def percentile(histogram: Histogram, share: float = 99.99) -> float:
    """The lower of the largest magnitude and the upper edge of the bin that reaches `share` percent of all values."""
    total = histogram.counts.sum()
    if not total:
        return 0.0
    place = int(np.searchsorted(np.cumsum(histogram.counts), total * share / 100))
    return min(histogram.amax, (place + 1) * histogram.width)


def entropy(histogram: Histogram) -> float:
    """The threshold whose quantized distribution is nearest to the clipped one, by KL divergence.

    As published (Migacz, "8-bit Inference with TensorRT", GTC 2017): for each number of bins from 128 up,
    P is the histogram cut off there with the rest added to its last bin, Q the same bins without the rest,
    merged into 128 levels and spread again over those that were not empty. Zeros, which any threshold keeps
    exactly, count as little as their neighbors, as in NVIDIA's pytorch-quantization.
    """
    counts = histogram.counts.astype(np.float64)
    counts[0] = counts[1]
    used = _used(histogram)
    if used <= _FIRST:
        return histogram.amax
    sizes = np.unique(np.linspace(_FIRST, used, _CANDIDATES).astype(int))
    best = min(sizes, key=lambda size: _divergence(counts[:used], int(size)))
    return min(histogram.amax, float(best) * histogram.width)


def _divergence(counts: NDArray[np.float64], size: int) -> float:
    p = counts[:size].copy()
    kept = p.copy()
    p[-1] += counts[size:].sum()
    level = np.arange(size) * _FIRST // size
    filled = kept > 0
    totals = np.bincount(level, kept, minlength=_FIRST)
    numbers = np.bincount(level, filled, minlength=_FIRST)
    q = np.where(filled, (totals / np.maximum(numbers, 1))[level], 0.0)
    filled = p > 0
    if q.sum() == 0 or not q[filled].all():
        return float("inf")
    p, q = p[filled] / p.sum(), q[filled] / q.sum()
    return float((p * np.log(p / q)).sum())


def mse(histogram: Histogram) -> float:
    """The threshold with the least mean squared error, of 256 between a hundredth of the largest magnitude and it."""
    if not histogram.amax:
        return 0.0
    candidates = np.geomspace(histogram.amax / 100, histogram.amax, _CANDIDATES)
    return float(candidates[quantization_errors(histogram, candidates).argmin()])


def quantization_errors(histogram: Histogram, thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the mean squared error of each threshold, (len(thresholds),), each value taken as its bin's center."""
    used = _used(histogram)
    counts, x = histogram.counts[:used].astype(np.float64), histogram.centers[:used]
    filled = counts > 0
    counts, x = counts[filled], x[filled]
    step = thresholds[:, None] / LEVELS
    quantized = np.minimum(np.round(x / step), LEVELS) * step
    errors: NDArray[np.float64] = ((x - quantized) ** 2 @ counts) / counts.sum()
    return errors


def _used(histogram: Histogram) -> int:
    """Bins up to the one of the largest magnitude."""
    return min(BINS, int(histogram.amax / histogram.width) + 1) if histogram.top else 0


METHODS: dict[str, Callable[[Histogram], float]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}
"""What `--method` can be, but for `auto`."""
