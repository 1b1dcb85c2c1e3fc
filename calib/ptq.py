"""`calibrate`: float32 ONNX classifier and real images → INT8 graph."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from calib.cache import cache_file
from calib.config import CalibrationConfig
from calib.counting import collect_histograms
from calib.equalize import ALPHAS, equalizable, equalized
from calib.histograms import Histogram
from calib.layers import LayerError, layer_errors
from calib.placement import Point, int8_share, points_of, residual_inputs
from calib.quantize import quantize
from calib.sensitivity import Fallback, Held, keep_budget
from calib.thresholds import METHODS, minmax, mse, percentile
from runtime.errors import DataError
from runtime.graph.collect import collect_channel_amax

__all__ = ["FEWEST", "TRIED", "Batches", "Calibrated", "calibrate"]

log = logging.getLogger(__name__)

FEWEST = 32
"""Fewer images than this are warned of."""
TRIED = 64
"""Images on which candidate thresholds, compromises and channel means are compared."""
_WORTH_IT = 0.9
"""Equalization must lower a tensor's noise to this share: it may cost a multiplication."""

Batches: TypeAlias = Callable[[int], Iterator[NDArray[np.float32]]]
"""Given a number of images, 0 for all: the normalized images, float32 (N, 3, H, W), a few at a time."""
Progress: TypeAlias = Callable[[str, int], None]
"""Called with a stage's name and its images, layers or steps so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """An INT8 graph and how it came about."""

    model: onnx.ModelProto
    """Q/DQ nodes where INT8 is wanted, float32 everywhere else."""
    source: onnx.ModelProto
    """The float32 graph that was quantized: the given one, or it equalized."""
    points: tuple[Point, ...]
    """Every convolution and matrix product, and whether it is quantized."""
    thresholds: dict[str, float]
    """Tensor → what 127 stands for."""
    histograms: dict[str, Histogram]
    """Tensor → magnitudes on the calibration images."""
    layers: tuple[LayerError, ...]
    """Each quantized layer at the threshold it got; empty where none was measured."""
    equalized: dict[str, float]
    """Tensor whose channels were scaled → its compromise."""
    fallback: Fallback | None
    """How the budget was kept, where there was one."""

    @property
    def int8_share(self) -> float:
        """Share of the multiply-accumulates that are in INT8, 0 to 1."""
        return int8_share(self.points)


def calibrate(
    model: onnx.ModelProto,
    batches: Batches,
    config: CalibrationConfig | None = None,
    *,
    held: Held | None = None,
    images_sha256: str = "",
    progress: Progress | None = None,
) -> Calibrated:
    """Quantizes a classifier after training.

    Args:
        model: a float32 graph with unique node names.
        batches: the calibration images.
        config: what is wished; its `images` and `mix` are the caller's affair.
        held: with a budget: the images it is kept on.
        images_sha256: hash of the images; where given, histograms are kept in the user's cache.
        progress: called as work goes on.

    Raises:
        ConfigError: a node to keep is not there.
        DataError: no images, images that are all the same, or values that are not finite.
        ModelFileError: the model is quantized already, or has nothing to quantize.
    """
    config = config or CalibrationConfig()
    count = _Counter(progress)
    points = points_of(model, config.keep, config.leave)
    alphas: dict[str, float] = {}
    if config.equalize:
        model, alphas = _equalized(model, points, batches, count)
        points = points_of(model, config.keep, config.leave)
    residuals = residual_inputs(model, points) if config.residuals else []
    added = [tensor for _, tensor in residuals]
    cache = cache_file(model, images_sha256) if images_sha256 else None
    histograms = collect_histograms(model, batches(0), [*_tensors(points), *added], count.of("ranges"), cache=cache)
    if count.total("ranges") < FEWEST:
        log.warning("%d calibration images are few: at least %d, better 256", count.total("ranges"), FEWEST)
    points = _alive(points, histograms)
    residuals = [(node, tensor) for node, tensor in residuals if histograms[tensor].amax]
    read = {name: histograms[name] for name in _tensors(points)}
    thresholds, layers = _thresholds(model, points, read, batches, config, count)
    for _, tensor in residuals:
        if tensor not in thresholds:  # no layer reads it, by whose output a threshold could be chosen
            thresholds[tensor] = METHODS.get(config.method, mse)(histograms[tensor])
    biases = {layer.node: -layer.shift for layer in layers} if config.correct_bias else {}
    weights: dict[str, NDArray[np.int8]] = {}
    if config.reconstruct:
        from calib.reconstruct import reconstruct  # torch

        weights, biases = reconstruct(
            model, points, thresholds, batches(TRIED), config.seed, progress=count.of("rounding")
        )

    def quantized(some: Sequence[Point]) -> onnx.ModelProto:
        still = set(residual_inputs(model, some)) & set(residuals)
        return quantize(model, some, thresholds, biases=biases, weights=weights, residuals=still)

    fallback = None
    if config.budget is not None and held:
        fallback = keep_budget(model, quantized, points, config.budget / 100, held, count)
        points = list(fallback.points)
    return Calibrated(
        model=quantized(points),
        source=model,
        points=tuple(points),
        thresholds=thresholds,
        histograms={name: histograms[name] for name in thresholds},
        layers=tuple(layers),
        equalized=alphas,
        fallback=fallback,
    )


class _Counter:
    """Counts what is done of each stage, and tells."""

    def __init__(self, progress: Progress | None) -> None:
        self._done: dict[str, int] = {}
        self._progress = progress

    def __call__(self, stage: str, more: int) -> None:
        self._done[stage] = self.total(stage) + more
        if self._progress:
            self._progress(stage, self._done[stage])

    def of(self, stage: str) -> Callable[[int], None]:
        return lambda more: self(stage, more)

    def total(self, stage: str) -> int:
        return self._done.get(stage, 0)


def _tensors(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(point.tensor for point in points if point.int8))


def _thresholds(
    model: onnx.ModelProto,
    points: Sequence[Point],
    histograms: dict[str, Histogram],
    batches: Batches,
    config: CalibrationConfig,
    count: _Counter,
) -> tuple[dict[str, float], list[LayerError]]:
    """What 127 stands for in each tensor, and what that does to each layer where it was measured."""
    if config.method == "auto":
        candidates = {name: _candidates(histogram) for name, histogram in histograms.items()}
    else:
        candidates = {name: [METHODS[config.method](histogram)] for name, histogram in histograms.items()}
    if config.method != "auto" and not config.correct_bias:
        return {name: values[0] for name, values in candidates.items()}, []
    return _choose(layer_errors(model, points, candidates, batches(TRIED), count.of("layers")))


def _equalized(
    model: onnx.ModelProto, points: Sequence[Point], batches: Batches, count: _Counter
) -> tuple[onnx.ModelProto, dict[str, float]]:
    """The graph with those tensors equalized that are worth it, and how far each."""
    names = equalizable(model, _tensors(points))
    if not names:
        log.info("no activation of this network can be equalized exactly")
        return model, {}
    maxima = collect_channel_amax(model, batches(TRIED), names, count.of("channels"))
    before = _noise(model, points, names, batches, count)
    best: dict[str, float] = {}
    least = {name: _WORTH_IT * noise for name, noise in before.items()}
    for alpha in ALPHAS:
        tried = equalized(model, maxima, dict.fromkeys(names, alpha))
        noises = _noise(tried, points_of(tried), names, batches, count)
        for name, noise in noises.items():
            if noise < least[name]:
                best[name], least[name] = alpha, noise
    return (equalized(model, maxima, best), best) if best else (model, best)


def _noise(
    model: onnx.ModelProto, points: Sequence[Point], names: Sequence[str], batches: Batches, count: _Counter
) -> dict[str, float]:
    """The noise that the layers reading each tensor get, at its threshold of least squared error."""
    histograms = collect_histograms(model, batches(TRIED), names, count.of("channels"))
    alive = {name: [mse(histogram)] for name, histogram in histograms.items() if histogram.amax}
    some = [point for point in points if point.int8 and point.tensor in alive]
    found: dict[str, float] = {}
    for layer in layer_errors(model, some, alive, batches(TRIED), count.of("channels")):
        found[layer.tensor] = found.get(layer.tensor, 0.0) + layer.noise
    return found


def _alive(points: Sequence[Point], histograms: dict[str, Histogram]) -> list[Point]:
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
