"""Numbers from times: percentiles as trtexec has them, ratios of rounds, drift. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Ratio", "drift", "percentile", "ratio", "summary"]

_RESAMPLES = 2000


def percentile(times: Sequence[float], percent: float) -> float:
    """Returns a percentile as trtexec does: one of the times, never a value between two.

    `n - 1 - int((1 - percent / 100) · n)` is the place among the sorted times, computed in float32, whose rounding
    shows: the 99th percentile of 100 times is the largest. Source: trtexec, sampleReporting.cpp, findPercentile.

    Args:
        times: at least one.
        percent: 0 to 100.
    """
    assert times and 0 <= percent <= 100
    share = np.float32(1) - np.float32(percent) / np.float32(100)
    excluded = int(share * np.float32(len(times)))
    return sorted(times)[max(len(times) - 1 - excluded, 0)]


def summary(times_ms: Sequence[float]) -> dict[str, Any]:
    """Returns what is told of a list of times.

    Args:
        times_ms: milliseconds, at least one.

    Returns:
        `count`, `min_ms`, `max_ms`, `mean_ms`, `p50_ms` (of an even count, between the two in the middle, as
        trtexec's median), `p90_ms`, `p95_ms`, `p99_ms`, and `cov_percent`: population standard deviation ÷ mean.
    """
    mean = statistics.fmean(times_ms)
    return {
        "count": len(times_ms),
        "min_ms": min(times_ms),
        "mean_ms": mean,
        "p50_ms": statistics.median(times_ms),
        "p90_ms": percentile(times_ms, 90),
        "p95_ms": percentile(times_ms, 95),
        "p99_ms": percentile(times_ms, 99),
        "max_ms": max(times_ms),
        "cov_percent": 100 * statistics.pstdev(times_ms, mean) / mean if mean else 0.0,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How many times another's value a value is."""

    median: float
    """Median of the rounds' ratios."""
    low: float
    """95 % interval of it: percentile bootstrap over rounds."""
    high: float


def ratio(values: Sequence[float], others: Sequence[float], seed: int = 0) -> Ratio:
    """Compares two contestants round by round.

    Args:
        values: one a round, above 0.
        others: the other's, of the same rounds.
        seed: of the resampling.
    """
    assert len(values) == len(others) > 0
    ratios = np.asarray(values, np.float64) / np.asarray(others, np.float64)
    places = np.random.default_rng(seed).integers(0, len(ratios), (_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[places], axis=1), [2.5, 97.5])
    return Ratio(median=float(np.median(ratios)), low=float(low), high=float(high))


def drift(values: Sequence[float]) -> float | None:
    """Returns by how much the median of the last third differs from the first's; None for fewer than three values."""
    third = len(values) // 3
    if third < 1:
        return None
    return statistics.median(values[-third:]) / statistics.median(values[:third]) - 1
