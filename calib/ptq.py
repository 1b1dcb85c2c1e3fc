"""`calibrate`: float32 ONNX classifier and real images → INT8 graph."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from calib.histograms import Histogram, collect_histograms
from calib.layers import LayerError, layer_errors
from calib.placement import Point, points_of
from calib.quantize import quantize
from calib.thresholds import METHODS, minmax, mse, percentile
from runtime.errors import ConfigError, DataError

__all__ = ["FEWEST", "TRIED", "Calibrated", "calibrate"]

log = logging.getLogger(__name__)

FEWEST = 32
"""Fewer images than this are warned of."""
TRIED = 64
"""Images on which candidate thresholds and channel means are compared."""

Batches = Callable[[int], Iterator[NDArray[np.float32]]]
"""Given a number of images, 0 for all: the normalised images, float32 (N, 3, H, W), a few at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """An INT8 graph and how it came about."""

    model: onnx.ModelProto
    """Q/DQ nodes where INT8 is wanted, float32 everywhere else."""
    points: tuple[Point, ...]
    """Every convolution and matrix product, and whether it is quantised."""
    thresholds: dict[str, float]
    """Tensor → what 127 stands for."""
    histograms: dict[str, Histogram]
    """Tensor → magnitudes on the calibration images."""
    layers: tuple[LayerError, ...]
    """Each quantised layer at the threshold it got; empty where none was measured."""

    @property
    def int8_share(self) -> float:
        """Share of the multiply-accumulates that are in INT8, 0 to 1."""
        total = sum(point.macs for point in self.points)
        return sum(point.macs for point in self.points if point.int8) / total if total else 0.0


def calibrate(
    model: onnx.ModelProto,
    batches: Batches,
    *,
    method: str = "auto",
    correct_bias: bool = True,
    keep: Sequence[str] = (),
    progress: Callable[[str, int], None] | None = None,
) -> Calibrated:
    """Quantises a classifier after training.

    Args:
        model: a float32 graph with unique node names.
        batches: the calibration images.
        method: one of METHODS, or `auto`: for each tensor, of several thresholds from the one of least squared error
            to the largest magnitude, that whose layers' outputs come out nearest.
        correct_bias: take the mean error of each output channel off its bias.
        keep: names of nodes that stay in floating point.
        progress: called with a stage's name and its number of images so far.

    Raises:
        ConfigError: an unknown method.
        DataError: no images, images that are all the same, or values that are not finite.
        ModelFileError: the model is quantised already, or has nothing to quantise.
    """
    if method not in (*METHODS, "auto"):
        raise ConfigError(f"method must be auto, {', '.join(METHODS)}; found {method!r}")
    points = points_of(model, keep)
    tensors = list(dict.fromkeys(point.tensor for point in points if point.int8))
    counted = _Counter("ranges", progress)
    histograms = collect_histograms(model, batches(0), tensors, counted)
    if counted.images < FEWEST:
        log.warning("%d calibration images are few: at least %d, better 256", counted.images, FEWEST)
    points = _alive(points, histograms)
    histograms = {point.tensor: histograms[point.tensor] for point in points if point.int8}
    thresholds = {}
    layers: list[LayerError] = []
    if method != "auto":
        thresholds = {name: METHODS[method](histogram) for name, histogram in histograms.items()}
    if method == "auto" or correct_bias:
        candidates = {
            name: [thresholds[name]] if thresholds else _candidates(histogram) for name, histogram in histograms.items()
        }
        tried = layer_errors(model, points, candidates, batches(TRIED), _Counter("layers", progress))
        thresholds, layers = _choose(tried)
    biases = {layer.node: -layer.shift for layer in layers} if correct_bias else {}
    quantised = quantize(model, points, thresholds, biases=biases)
    return Calibrated(
        model=quantised, points=tuple(points), thresholds=thresholds, histograms=histograms, layers=tuple(layers)
    )


class _Counter:
    """Counts images, and tells."""

    def __init__(self, stage: str, progress: Callable[[str, int], None] | None) -> None:
        self.images = 0
        self._stage, self._progress = stage, progress

    def __call__(self, images: int) -> None:
        self.images += images
        if self._progress:
            self._progress(self._stage, self.images)


def _alive(points: list[Point], histograms: dict[str, Histogram]) -> list[Point]:
    """Keeps layers in floating point that read nothing but zeros: no range can be told from that."""
    if not any(histogram.amax for histogram in histograms.values()):
        raise DataError("every tensor is zero on the calibration images; are they real photographs?")
    return [
        dataclasses.replace(point, int8=False, reason=f"{point.tensor} is zero on every calibration image")
        if point.int8 and not histograms[point.tensor].amax
        else point
        for point in points
    ]


def _candidates(histogram: Histogram) -> list[float]:
    """Thresholds worth trying, from the one of least squared error to the largest magnitude."""
    best = mse(histogram)
    found = (best, percentile(histogram, 99.99), percentile(histogram, 99.999), minmax(histogram))
    return [value for value in dict.fromkeys(found) if value > 0] or [0.0]


def _choose(tried: list[LayerError]) -> tuple[dict[str, float], list[LayerError]]:
    """The threshold of each tensor that leaves its readers the least noise together."""
    noise: dict[str, dict[float, float]] = {}
    for layer in tried:
        of_tensor = noise.setdefault(layer.tensor, {})
        of_tensor[layer.threshold] = of_tensor.get(layer.threshold, 0.0) + layer.noise
    chosen = {tensor: min(options, key=lambda value: options[value]) for tensor, options in noise.items()}
    return chosen, [layer for layer in tried if chosen[layer.tensor] == layer.threshold]
