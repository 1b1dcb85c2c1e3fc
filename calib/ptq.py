"""Quantize a float32 ONNX classifier to INT8 with real images, without training."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from calib.config import CalibrationConfig
from calib.equalize import ALPHAS, equalizable_tensors, equalize
from calib.histograms import Histogram, cache_file, collect_histograms
from calib.layer_errors import LayerError, layer_errors
from calib.placement import Point, int8_share, points_of, residual_inputs
from calib.quantize import quantize
from calib.sensitivity import Fallback, HeldOut, meet_budget
from calib.thresholds import METHODS, minmax, mse, percentile
from runtime.errors import DataError
from runtime.graph.collect import collect_channel_amax

__all__ = ["MIN_IMAGES", "TRIAL_IMAGES", "Batches", "Calibrated", "calibrate"]

log = logging.getLogger(__name__)

MIN_IMAGES = 32
"""A warning is logged if there are fewer images than this."""
TRIAL_IMAGES = 64
"""Number of images on which candidate thresholds, equalizations and channel means are measured."""
_EQUALIZED_NOISE = 0.9
"""Equalization must reduce a tensor's noise to this share to be applied, because it can cost a
multiplication."""

Batches: TypeAlias = Callable[[int], Iterator[NDArray[np.float32]]]
"""Number of images, 0 for all → batches of normalized images, float32 (N, 3, H, W)."""
Progress: TypeAlias = Callable[[str, int], None]
"""Called with the name of a stage and the number of images, layers or steps done so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """An INT8 graph, and the thresholds and measurements it was made from."""

    model: onnx.ModelProto
    """The graph: Q/DQ nodes around INT8 layers, float32 everywhere else."""
    source: onnx.ModelProto
    """The float32 graph that was quantized: the input graph, or its equalized version."""
    points: tuple[Point, ...]
    """Every convolution and matrix product, and whether it is quantized."""
    thresholds: dict[str, float]
    """Tensor → clipping threshold (amax)."""
    histograms: dict[str, Histogram]
    """Tensor → its magnitudes on the calibration images."""
    layers: tuple[LayerError, ...]
    """Error of each quantized layer at its threshold; empty if it was not measured."""
    equalized: dict[str, float]
    """Equalized tensor → α; see `calib.equalize`."""
    fallback: Fallback | None
    """The layers kept in floating point for the budget; None without a budget."""

    @property
    def int8_share(self) -> float:
        """Share of the multiply-accumulates that are in INT8, 0 to 1."""
        return int8_share(self.points)


class _Ranges(NamedTuple):
    """Measurements of the pass over all images, without layers and tensors that are always zero."""

    points: list[Point]
    residuals: list[tuple[str, str]]
    """(Add node, tensor) pairs from `residual_inputs`."""
    histograms: dict[str, Histogram]


def calibrate(
    model: onnx.ModelProto,
    batches: Batches,
    config: CalibrationConfig | None = None,
    *,
    held: HeldOut | None = None,
    images_sha256: str = "",
    progress: Progress | None = None,
) -> Calibrated:
    """Quantize a classifier after training.

    Args:
        model: a float32 graph with unique node names.
        batches: the calibration images.
        config: settings; `images` and `mix` have no effect here, because the caller provides the
            images.
        held: held-out images, on which the budget is measured.
        images_sha256: hash of the images. If given, histograms are cached in the user's cache
            folder.
        progress: called with the stage and its progress as the work proceeds.

    Raises:
        ConfigError: a node to keep in floating point does not exist.
        DataError: there are no images, every tensor is zero on them, or a value is not finite.
        ModelFileError: the model is already quantized, or has nothing to quantize.
    """
    config = config or CalibrationConfig()
    track = _Tracker(progress)
    points = points_of(model, config.keep, config.leave)
    alphas: dict[str, float] = {}
    if config.equalize:
        model, alphas = _equalize(model, points, batches, track)
        points = points_of(model, config.keep, config.leave)
    ranges = _measure_ranges(model, points, batches, config, images_sha256, track)
    points = ranges.points
    thresholds, layers = _choose_thresholds(model, ranges, batches, config, track)
    points = _exclude_noisy(points, layers, config.max_noise)
    weights, biases = _correct_rounding(model, points, thresholds, layers, batches, config, track)

    def quantize_points(some: Sequence[Point]) -> onnx.ModelProto:
        residuals = set(residual_inputs(model, some)) & set(ranges.residuals)
        return quantize(model, some, thresholds, biases=biases, weights=weights, residuals=residuals)

    fallback = None
    if config.budget is not None and held:
        fallback = meet_budget(model, quantize_points, points, config.budget / 100, held, track)
        points = list(fallback.points)
    return Calibrated(
        model=quantize_points(points),
        source=model,
        points=tuple(points),
        thresholds=thresholds,
        histograms={name: ranges.histograms[name] for name in thresholds},
        layers=tuple(layers),
        equalized=alphas,
        fallback=fallback,
    )


class _Tracker:
    """Adds up the progress of each stage and reports it."""

    def __init__(self, progress: Progress | None) -> None:
        self._done: dict[str, int] = {}
        self._progress = progress

    def __call__(self, stage: str, more: int) -> None:
        self._done[stage] = self.total(stage) + more
        if self._progress:
            self._progress(stage, self._done[stage])

    def stage(self, name: str) -> Callable[[int], None]:
        return lambda more: self(name, more)

    def total(self, stage: str) -> int:
        return self._done.get(stage, 0)


def _equalize(
    model: onnx.ModelProto, points: Sequence[Point], batches: Batches, track: _Tracker
) -> tuple[onnx.ModelProto, dict[str, float]]:
    """Equalize the tensors whose noise decreases enough; return the graph and their α."""
    names = equalizable_tensors(model, _int8_tensors(points))
    if not names:
        log.info("no activation of this network can be equalized exactly")
        return model, {}
    maxima = collect_channel_amax(model, batches(TRIAL_IMAGES), names, track.stage("channels"))
    before = _noise_per_tensor(model, points, names, batches, track)
    best: dict[str, float] = {}
    lowest = {name: _EQUALIZED_NOISE * noise for name, noise in before.items()}
    for alpha in ALPHAS:
        tried = equalize(model, maxima, dict.fromkeys(names, alpha))
        noises = _noise_per_tensor(tried, points_of(tried), names, batches, track)
        for name, noise in noises.items():
            if noise < lowest[name]:
                best[name], lowest[name] = alpha, noise
    return (equalize(model, maxima, best), best) if best else (model, best)


def _noise_per_tensor(
    model: onnx.ModelProto, points: Sequence[Point], names: Sequence[str], batches: Batches, track: _Tracker
) -> dict[str, float]:
    """Return the total noise of each tensor's readers, at the threshold with the smallest error."""
    histograms = collect_histograms(model, batches(TRIAL_IMAGES), names, track.stage("channels"))
    thresholds = {name: [mse(histogram)] for name, histogram in histograms.items() if histogram.amax}
    some = [point for point in points if point.int8 and point.tensor in thresholds]
    noise: dict[str, float] = {}
    for layer in layer_errors(model, some, thresholds, batches(TRIAL_IMAGES), track.stage("channels")):
        noise[layer.tensor] = noise.get(layer.tensor, 0.0) + layer.noise
    return noise


def _measure_ranges(
    model: onnx.ModelProto,
    points: Sequence[Point],
    batches: Batches,
    config: CalibrationConfig,
    images_sha256: str,
    track: _Tracker,
) -> _Ranges:
    """Collect histograms of all quantized tensors; drop layers with inputs that are always zero."""
    residuals = residual_inputs(model, points) if config.residuals else []
    tensors = [*_int8_tensors(points), *(tensor for _, tensor in residuals)]
    cache = cache_file(model, images_sha256) if images_sha256 else None
    histograms = collect_histograms(model, batches(0), tensors, track.stage("ranges"), cache=cache)
    images = track.total("ranges")
    if images < MIN_IMAGES:
        log.warning("found only %d calibration images; use at least %d (recommended: 256)", images, MIN_IMAGES)
    if not any(histogram.amax for histogram in histograms.values()):
        raise DataError("every tensor is zero on the calibration images; check that they are real photographs")
    return _Ranges(
        points=[_exclude_zero_input(point, histograms) for point in points],
        residuals=[(node, tensor) for node, tensor in residuals if histograms[tensor].amax],
        histograms=histograms,
    )


def _exclude_zero_input(point: Point, histograms: Mapping[str, Histogram]) -> Point:
    """Keep a layer in floating point if its input is always zero and has no range."""
    if not point.int8 or histograms[point.tensor].amax:
        return point
    return dataclasses.replace(point, int8=False, reason=f"{point.tensor} is zero on every calibration image")


def _exclude_noisy(points: Sequence[Point], layers: Sequence[LayerError], max_noise: float) -> list[Point]:
    """Keep layers with an INT8 error above `max_noise` percent in floating point."""
    noise = {layer.node: 100 * layer.noise for layer in layers}
    chosen = []
    for point in points:
        found = noise.get(point.node, 0.0)
        if point.int8 and found > max_noise:
            reason = f"INT8 error is {found:.2g} % of its output (limit {max_noise:g} %)"
            log.info("%s stays in floating point: its %s", point.node, reason)
            point = dataclasses.replace(point, int8=False, reason=reason)
        chosen.append(point)
    return chosen


def _int8_tensors(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(point.tensor for point in points if point.int8))


def _choose_thresholds(
    model: onnx.ModelProto, ranges: _Ranges, batches: Batches, config: CalibrationConfig, track: _Tracker
) -> tuple[dict[str, float], list[LayerError]]:
    """Return the threshold of each quantized tensor, and the measured errors of layers."""
    tensors = _int8_tensors(ranges.points)
    candidates = {name: _candidates(ranges.histograms[name], config.method) for name in tensors}
    thresholds, layers = {name: values[0] for name, values in candidates.items()}, list[LayerError]()
    if config.method == "auto" or config.correct_bias:
        trials = batches(TRIAL_IMAGES)
        thresholds, layers = _pick_thresholds(
            layer_errors(model, ranges.points, candidates, trials, track.stage("layers"))
        )
    for _, tensor in ranges.residuals:
        if tensor not in thresholds:  # no quantized layer reads the tensor, so no layer error can decide
            thresholds[tensor] = METHODS.get(config.method, mse)(ranges.histograms[tensor])
    return thresholds, layers


def _candidates(histogram: Histogram, method: str) -> list[float]:
    """Return the thresholds to try; `auto` starts from the one with the smallest squared error."""
    if method != "auto":
        return [METHODS[method](histogram)]
    found = (mse(histogram), percentile(histogram, 99.99), percentile(histogram, 99.999), minmax(histogram))
    return [value for value in dict.fromkeys(found) if value > 0] or [0.0]


def _pick_thresholds(tried: Collection[LayerError]) -> tuple[dict[str, float], list[LayerError]]:
    """Pick the threshold of each tensor with the smallest total noise of its readers."""
    noise: dict[str, dict[float, float]] = {}
    for layer in tried:
        totals = noise.setdefault(layer.tensor, {})
        totals[layer.threshold] = totals.get(layer.threshold, 0.0) + layer.noise
    chosen = {tensor: min(totals, key=lambda value: totals[value]) for tensor, totals in noise.items()}
    return chosen, [layer for layer in tried if chosen[layer.tensor] == layer.threshold]


def _correct_rounding(
    model: onnx.ModelProto,
    points: Sequence[Point],
    thresholds: dict[str, float],
    layers: Sequence[LayerError],
    batches: Batches,
    config: CalibrationConfig,
    track: _Tracker,
) -> tuple[dict[str, NDArray[np.int8]], dict[str, NDArray[np.float64]]]:
    """Return learned int8 weights and corrections of biases, as `quantize` expects them."""
    if not config.reconstruct:
        return {}, {layer.node: -layer.shift for layer in layers} if config.correct_bias else {}
    from calib.reconstruct import reconstruct  # imports torch

    trials = batches(TRIAL_IMAGES)
    return reconstruct(model, points, thresholds, trials, config.seed, progress=track.stage("rounding"))
