"""Percentiles, ratios and drift against values computed in other ways, and settings."""

import random
import statistics
import struct
from typing import Any

import numpy as np
import pytest

from runtime.bench.run import BenchConfig
from runtime.bench.statistics import drift, percentile, ratio, summary
from runtime.errors import ConfigError


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def trtexec_percentile(times: list[float], percent: float) -> float:
    """Return findPercentile of sampleReporting.cpp, with C++ floats, by ranks."""
    share = float32(1 - float32(float32(percent) / 100))
    place = max(len(times) - 1 - int(float32(share * len(times))), 0)
    (value,) = {time for time in times if sum(other < time for other in times) <= place < sum(t <= time for t in times)}
    return value


@pytest.mark.parametrize("count", [1, 2, 3, 9, 10, 11, 20, 99, 100, 101, 250])
def test_percentiles_equal_trtexecs(count: int) -> None:
    times = [random.Random(count).choice(range(count * 2)) / 7 for _ in range(count)]
    random.Random(0).shuffle(times)
    for percent in (0, 50, 90, 95, 99, 99.9, 100):
        assert percentile(times, percent) == trtexec_percentile(times, percent)


def test_known_percentiles() -> None:
    times = [float(number) for number in range(1, 101)]
    assert [percentile(times, percent) for percent in (50, 90, 95, 100)] == [50, 90, 95, 100]
    assert percentile(times, 99) == 100  # in float32, 1 - 0.99 is less than 0.01, so none of 100 is excluded
    assert percentile([5.0], 99) == 5
    assert percentile(list(map(float, range(1, 11))), 90) == 9


def test_a_summary_of_times() -> None:
    times = [4.0, 1.0, 2.0, 3.0]
    found = summary(times)
    assert (found["count"], found["min_ms"], found["max_ms"], found["mean_ms"]) == (4, 1, 4, 2.5)
    assert found["p50_ms"] == 2.5  # trtexec's median is between the two middle values
    assert found["p99_ms"] == 4
    assert found["cov_percent"] == pytest.approx(100 * np.std(times) / np.mean(times))
    assert summary([3.0])["cov_percent"] == 0


def test_ratios_compare_the_same_round() -> None:
    speeds = np.asarray([1, 1, 5, 5, 1, 9, 1, 2, 2, 1.0])  # of the machine, round by round
    found = ratio(list(3 * speeds), list(speeds))
    assert found.median == found.low == found.high == 3
    noise = np.random.default_rng(0).normal(1, 0.05, 10)
    found = ratio(list(1.2 * speeds * noise), list(speeds))
    assert found.low <= found.median <= found.high
    assert found.median == pytest.approx(statistics.median(1.2 * noise))
    assert found == ratio(list(1.2 * speeds * noise), list(speeds))
    assert found.low > 1  # medians over all rounds would not show it: 1.2 against a spread of 9
    single = ratio([2.0], [1.0])
    assert (single.low, single.median, single.high) == (2, 2, 2)


def test_the_interval_covers_the_true_ratio_as_often_as_it_claims() -> None:
    random_ = np.random.default_rng(1)
    covered = 0
    for number in range(200):
        found = ratio(list(random_.lognormal(0, 0.1, 15)), [1.0] * 15, seed=number)
        covered += found.low <= 1 <= found.high
    assert 0.88 <= covered / 200 <= 1


def test_drift_compares_the_ends_of_a_run() -> None:
    assert drift([1, 1, 1, 5, 1.1, 1.1, 1.1]) == pytest.approx(0.1)
    assert drift([2, 1, 1]) == -0.5
    assert drift([1, 2]) is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_sizes": (8, 0)}, r"batch_sizes must be at least 1; found 8, 0"),
        ({"batch_sizes": (8, 8)}, "batch_sizes contains a number twice"),
        ({"concurrency": ()}, "concurrency must contain a number"),
        ({"concurrency": (-1,)}, "at least 1"),
        ({"rounds": 0}, "iterations and rounds must be at least 1"),
        ({"duration_s": float("nan")}, "duration_s must be at least 0; found nan"),
        ({"warm_up_ms": -1.0}, "warm_up_ms must be at least 0"),
    ],
)
def test_invalid_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchConfig(**wrong)


def test_duration_and_iterations_are_divided_among_rounds() -> None:
    config = BenchConfig(duration_s=3, iterations=10, rounds=4)
    assert (config.round_s, config.round_calls) == (0.75, 3)
