"""95% confidence intervals, computed from counts only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

__all__ = ["Interval", "detectable", "jackknife", "newcombe_paired", "wilson", "zero_variance"]

Interval = tuple[float, float]
"""Lower and upper end."""

_Z = 1.959963984540054
"""97.5% quantile of the normal distribution."""

_Z_POWER = 0.8416212335729143
"""80% quantile of the normal distribution."""

_T: tuple[float, ...] = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_T += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
"""97.5% quantiles of Student's t for 1 to 20 degrees of freedom, rounded as in printed tables."""


def wilson(successes: int, total: int) -> Interval | None:
    """Return Wilson's score interval of a proportion, or None if `total` is 0.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference" (JASA 22,
    1927).
    """
    if total == 0:
        return None
    share, scale = successes / total, 1 + _Z**2 / total
    middle = (share + _Z**2 / (2 * total)) / scale
    half = _Z / scale * math.sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2))
    # If an end touches the proportion, rounding must not move it to the other side.
    return min(max(0.0, middle - half), share), max(min(1.0, middle + half), share)


def newcombe_paired(both: int, only_first: int, only_second: int, neither: int) -> Interval | None:
    """Return an interval of the accuracy difference of two classifiers on the same images.

    It combines the Wilson intervals of both accuracies with the correlation of the classifiers:
    method 10 of Newcombe, "Improved confidence intervals for the difference between binomial
    proportions based on paired data" (Statistics in Medicine 17, 1998). If the interval excludes 0,
    the classifiers differ, as in McNemar's test.

    Args:
        both: images that both classify correctly.
        only_first: images that only the first classifies correctly.
        only_second: images that only the second classifies correctly.
        neither: images that both misclassify.

    Returns:
        Interval of the first accuracy minus the second, in [−1, 1]; None if there are no images.
    """
    total = both + only_first + only_second + neither
    first, second = wilson(both + only_first, total), wilson(both + only_second, total)
    if first is None or second is None:
        return None
    p, q = (both + only_first) / total, (both + only_second) / total
    phi = _correlation(both, only_first, only_second, neither, total)
    below, above = p - first[0], second[1] - q
    lower = math.sqrt(max(0.0, below**2 - 2 * phi * below * above + above**2))
    above, below = first[1] - p, q - second[0]
    upper = math.sqrt(max(0.0, above**2 - 2 * phi * above * below + below**2))
    return p - q - lower, p - q + upper


def _correlation(both: int, only_first: int, only_second: int, neither: int, total: int) -> float:
    """Return Newcombe's φ, with his continuity correction if it is positive."""
    product = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if product == 0:
        return 0.0
    excess = both * neither - only_first * only_second
    return (max(excess - total / 2, 0.0) if excess > 0 else float(excess)) / math.sqrt(product)


def jackknife(statistic: Callable[[Sequence[int]], float], groups: int) -> Interval | None:
    """Return an interval of a statistic of grouped images, by removing one group after another.

    A mean over corruptions uses the same images many times, so the binomial formula does not hold.
    Each group is a set of images with everything that was measured on them. Source: the
    delete-a-group jackknife, Wolter, "Introduction to Variance Estimation" (2nd edition, 2007),
    chapter 4.

    Args:
        statistic: returns the statistic on the images of the given groups.
        groups: number of groups, each with images in it.

    Returns:
        Interval around the statistic of all groups; None if there are fewer than two groups.
    """
    if not 2 <= groups <= len(_T) + 1:
        return None
    everything = range(groups)
    without = [statistic([group for group in everything if group != removed]) for removed in everything]
    mean = math.fsum(without) / groups
    variance = (groups - 1) / groups * math.fsum((value - mean) ** 2 for value in without)
    half, whole = _T[groups - 2] * math.sqrt(variance), statistic(everything)
    return whole - half, whole + half


def detectable(interval: Interval) -> float:
    """Return the size of a difference that an interval of this width excludes from 0 in 80% of cases.

    Args:
        interval: 95% interval of a difference. Half its width is 1.96 standard errors; a difference
            of 1.96 + 0.84 standard errors has a power of 80%.
    """
    return (_Z + _Z_POWER) / _Z * (interval[1] - interval[0]) / 2


def zero_variance(value: float, images: int, lowest: float, highest: float) -> Interval:
    """Return an interval of a mean over images that all have the same value.

    Their variance is 0, but an interval without width would be wrong, because the next image may be
    the first to differ. At most z²/(n + z²) of all images differ: the upper end of Wilson's
    interval of 0 in n, about 3.8/n. (The "rule of three" of Hanley and Lippman-Hand, "If nothing
    goes wrong, is everything all right?", JAMA 249, 1983, is the one-sided form.) Each of these
    images has a value from `lowest` to `highest`.

    Args:
        value: the common value of all images.
        images: number of images, at least one.
        lowest: lowest possible value of an image.
        highest: highest possible value of an image.
    """
    found = wilson(0, images)
    assert found is not None
    share = found[1]
    return value + share * (lowest - value), value + share * (highest - value)
