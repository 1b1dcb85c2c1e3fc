import numpy as np
import pytest

from calib.histograms import Histogram
from calib.thresholds import LEVELS, METHODS, entropy, minmax, mse, percentile, quantization_errors

NORMAL = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
LAPLACE = np.random.default_rng(1).laplace(size=100_000).astype(np.float32)
OUTLIER = np.concatenate([NORMAL, np.asarray([40.0], np.float32)])


def histogram(values: np.ndarray) -> Histogram:
    result = Histogram()
    result.add(values)
    return result


def error(values: np.ndarray, threshold: float) -> float:
    """Return the mean squared error of INT8, computed value by value."""
    step = threshold / LEVELS
    return float(((values - np.clip(np.round(values / step), -LEVELS, LEVELS) * step) ** 2).mean())


def test_minmax_clips_nothing() -> None:
    assert minmax(histogram(OUTLIER)) == 40.0


@pytest.mark.parametrize("share", [50, 99, 99.9, 99.99])
def test_percentiles_match_numpy_within_a_bin(share: float) -> None:
    counted = histogram(LAPLACE)
    assert percentile(counted, share) == pytest.approx(np.percentile(np.abs(LAPLACE), share), abs=2 * counted.width)
    assert percentile(counted, 100) == counted.amax


@pytest.mark.parametrize("values", [NORMAL, LAPLACE, OUTLIER], ids=["normal", "laplace", "outlier"])
def test_the_mse_threshold_is_the_best_of_a_search_over_the_values(values: np.ndarray) -> None:
    tried = np.geomspace(np.abs(values).max() / 100, np.abs(values).max(), 400)
    best = min(error(values, threshold) for threshold in tried)
    assert error(values, mse(histogram(values))) <= 1.01 * best
    assert quantization_errors(histogram(values), tried) == pytest.approx(
        [error(values, threshold) for threshold in tried], rel=0.05, abs=1e-6
    )


def brute_entropy(counts: np.ndarray, width: float) -> float:
    """Return the threshold of the published algorithm, computed bin by bin."""
    counts = np.asarray([counts[1], *counts[1:]])
    used = int(np.flatnonzero(counts)[-1]) + 1
    best, least = used, np.inf
    for size in range(128, used + 1):
        p = counts[:size].astype(float)
        p[-1] += counts[size:].sum()
        q = np.zeros(size)
        for level in range(128):
            inside = [place for place in range(size) if place * 128 // size == level and counts[place] > 0]
            for place in inside:
                q[place] = sum(counts[other] for other in inside) / len(inside)
        if not q.sum():
            continue
        p, q = p / p.sum(), q / q.sum()
        if (q[p > 0] == 0).any():
            continue
        divergence = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
        if divergence < least:
            best, least = size, divergence
    return best * width


def test_entropy_matches_the_published_algorithm() -> None:
    counted = Histogram()
    counted.add(np.asarray([0.99], np.float32))  # sets the range to 1
    random = np.random.default_rng(2)
    counted.counts[:] = 0
    counted.counts[:300] = (1e5 * np.exp(-np.arange(300) / 40)).astype(int) + random.integers(0, 20, 300)
    counted.amax = 300 * counted.width
    assert entropy(counted) == pytest.approx(brute_entropy(counted.counts, counted.width))


def test_methods_differ_in_how_they_treat_an_outlier() -> None:
    counted = histogram(OUTLIER)
    thresholds = {name: method(counted) for name, method in METHODS.items()}
    assert all(0 < value <= counted.amax for value in thresholds.values())
    assert thresholds["minmax"] == 40
    assert thresholds["percentile"] < 6
    assert 10 < thresholds["mse"] < 30  # one value in 100,001, but its error is squared
    assert thresholds["entropy"] < 6


def test_the_threshold_of_zeros_is_zero() -> None:
    assert {name: method(histogram(np.zeros(9, np.float32))) for name, method in METHODS.items()} == dict.fromkeys(
        METHODS, 0.0
    )
