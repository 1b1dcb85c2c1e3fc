"""Positions of labels, and the Pareto front."""

import itertools

import numpy as np

from runtime.bench.plot import pareto_front, place_labels


def boxes(points: list[tuple[float, float]], labels: list[str]) -> list[tuple[float, float, float, float]]:
    half = [(0.29 * 8 * len(text), 4.4) for text in labels]
    middles = [(x + dx, y + dy) for (x, y), (dx, dy) in zip(points, place_labels(points, labels), strict=True)]
    return [(x - w, y - h, x + w, y + h) for (x, y), (w, h) in zip(middles, half, strict=True)]


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return min(one[2], other[2]) > max(one[0], other[0]) and min(one[3], other[3]) > max(one[1], other[1])


def test_labels_overlap_neither_each_other_nor_points() -> None:
    points = [(100.0, 100.0), (104.0, 103.0), (140.0, 100.0), (100.0, 130.0)]
    found = boxes(points, ["8×1", "8×2", "32×16", "1×1"])
    assert not any(overlap(*pair) for pair in itertools.combinations(found, 2))
    marks = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    assert not any(overlap(box, mark) for box in found for mark in marks)


def test_a_single_label_is_above_its_point() -> None:
    assert place_labels([(50, 50)], ["8"]) == [(0, 9)]


def test_pareto_front() -> None:
    points = [(3.0, 30.0), (1.0, 10.0), (2.0, 9.0), (3.0, 20.0), (4.0, 30.0), (5.0, 31.0)]
    assert pareto_front(points) == [(1, 10), (3, 30), (5, 31)]
    cloud = [tuple(point) for point in np.random.default_rng(0).random((50, 2)).tolist()]
    best = pareto_front(cloud)
    for x, y in cloud:
        dominated = any((a <= x and b >= y) and (a, b) != (x, y) for a, b in cloud)
        assert ((x, y) in best) != dominated
