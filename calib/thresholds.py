"""Choose a clipping threshold (amax) from a histogram of magnitudes.

INT8 represents x as round(x / s), clipped to ±127, with the scale s = threshold / 127. A lower
threshold makes the steps finer and clips more values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from calib.histograms import Histogram

__all__ = ["LEVELS", "METHODS", "entropy", "minmax", "mse", "percentile", "quantization_errors"]

LEVELS = 127
"""Quantization steps on each side of zero."""
_CANDIDATES = 256
_ENTROPY_LEVELS = 128
"""Levels of the quantized distribution, and the smallest number of bins that `entropy` tries."""


def minmax(histogram: Histogram) -> float:
    """Return the largest magnitude, a threshold that clips no value."""
    return histogram.amax


def percentile(histogram: Histogram, share: float = 99.99) -> float:
    """Return the upper edge of the bin that reaches `share` percent of all values.

    The result is at most the largest magnitude.
    """
    total = histogram.counts.sum()
    if not total:
        return 0.0
    place = int(np.searchsorted(np.cumsum(histogram.counts), total * share / 100))
    return min(histogram.amax, (place + 1) * histogram.width)


def entropy(histogram: Histogram) -> float:
    """Return the threshold with the smallest KL divergence after clipping and quantizing.

    The algorithm is the published one (Migacz, "8-bit Inference with TensorRT", GTC 2017). For each
    number of bins from 128 up, P is the histogram cut off there, with the remaining values added to
    its last bin. Q is made of the same bins without the remaining values: merged into 128 levels,
    then spread evenly over the bins of each level that are not empty. The first bin counts as many
    values as the second, as in NVIDIA's pytorch-quantization, because every threshold represents
    zeros exactly.
    """
    counts = histogram.counts.astype(np.float64)
    counts[0] = counts[1]
    used = _used_bins(histogram)
    if used <= _ENTROPY_LEVELS:
        return histogram.amax
    sizes = np.unique(np.linspace(_ENTROPY_LEVELS, used, _CANDIDATES).astype(int))
    best = min(sizes, key=lambda size: _divergence(counts[:used], int(size)))
    return min(histogram.amax, float(best) * histogram.width)


def _divergence(counts: NDArray[np.float64], size: int) -> float:
    p = counts[:size].copy()
    kept = p.copy()
    p[-1] += counts[size:].sum()
    level = np.arange(size) * _ENTROPY_LEVELS // size
    filled = kept > 0
    totals = np.bincount(level, kept, minlength=_ENTROPY_LEVELS)
    numbers = np.bincount(level, filled, minlength=_ENTROPY_LEVELS)
    q = np.where(filled, (totals / np.maximum(numbers, 1))[level], 0.0)
    filled = p > 0
    if q.sum() == 0 or not q[filled].all():
        return float("inf")
    p, q = p[filled] / p.sum(), q[filled] / q.sum()
    return float((p * np.log(p / q)).sum())


def mse(histogram: Histogram) -> float:
    """Return the threshold with the smallest mean squared error.

    Tries 256 thresholds from 1% to 100% of the largest magnitude.
    """
    if not histogram.amax:
        return 0.0
    candidates = np.geomspace(histogram.amax / 100, histogram.amax, _CANDIDATES)
    return float(candidates[quantization_errors(histogram, candidates).argmin()])


def quantization_errors(histogram: Histogram, thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean squared error of each threshold, with every value at its bin's center."""
    used = _used_bins(histogram)
    counts, x = histogram.counts[:used].astype(np.float64), histogram.centers[:used]
    filled = counts > 0
    counts, x = counts[filled], x[filled]
    step = thresholds[:, None] / LEVELS
    quantized = np.minimum(np.round(x / step), LEVELS) * step
    errors: NDArray[np.float64] = ((x - quantized) ** 2 @ counts) / counts.sum()
    return errors


def _used_bins(histogram: Histogram) -> int:
    """Return the number of bins up to that of the largest magnitude."""
    return min(len(histogram.counts), int(histogram.amax / histogram.width) + 1) if histogram.top else 0


METHODS: dict[str, Callable[[Histogram], float]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}
"""The methods that `--method` accepts, in addition to `auto`."""
