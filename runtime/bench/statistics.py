"""Statistics of latencies: trtexec's percentiles, ratios between targets, and drift."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Ratio", "drift", "percentile", "ratio", "summary"]

_RESAMPLES = 2000


def percentile(times: Sequence[float], percent: float) -> float:
    """Return a percentile as trtexec does: one of the times, never a value between two.

    The index among the sorted times is `n - 1 - int((1 - percent / 100) · n)`, computed in float32.
    Its rounding matters: the 99th percentile of 100 times is the largest. Source: trtexec,
    sampleReporting.cpp, findPercentile.

    Args:
        times: at least one time.
        percent: 0 to 100.
    """
    assert times and 0 <= percent <= 100
    share = np.float32(1) - np.float32(percent) / np.float32(100)
    excluded = int(share * np.float32(len(times)))
    return sorted(times)[max(len(times) - 1 - excluded, 0)]


def summary(times_ms: Sequence[float]) -> dict[str, Any]:
    """Return summary statistics of times.

    Args:
        times_ms: milliseconds, at least one.

    Returns:
        `count`, `min_ms`, `max_ms`, `mean_ms`, `p50_ms` (the mean of the two middle values if the
        count is even, as trtexec's median), `p90_ms`, `p95_ms`, `p99_ms`, and `cov_percent`, the
        population standard deviation ÷ mean.
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
    """Ratio of two targets' values over rounds."""

    median: float
    """Median of the rounds' ratios."""
    low: float
    """Lower end of the median's 95% interval (percentile bootstrap over rounds)."""
    high: float
    """Upper end of that interval."""


def ratio(values: Sequence[float], others: Sequence[float], seed: int = 0) -> Ratio:
    """Return the ratio of two targets' values, compared round by round.

    Args:
        values: one value per round, above 0.
        others: values of the other target in the same rounds.
        seed: seed of the bootstrap.
    """
    assert len(values) == len(others) > 0
    ratios = np.asarray(values, np.float64) / np.asarray(others, np.float64)
    samples = np.random.default_rng(seed).integers(0, len(ratios), (_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[samples], axis=1), [2.5, 97.5])
    return Ratio(median=float(np.median(ratios)), low=float(low), high=float(high))


def drift(values: Sequence[float]) -> float | None:
    """Return the relative change of the median from the first to the last third of the values.

    It is None for fewer than three values.
    """
    third = len(values) // 3
    if third < 1:
        return None
    return statistics.median(values[-third:]) / statistics.median(values[:third]) - 1
