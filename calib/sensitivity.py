"""Meet an accuracy budget: find the layers to keep in floating point while all others are INT8.

The images need no labels. The cost of INT8 is estimated with the float32 network's own
probabilities p: an image whose top-1 class changes from a to b costs p(a) − p(b), the expected loss
of top-1 accuracy if p is calibrated. This estimate has much less noise than the number of changed
images, because most changes are between classes of almost equal probability.

The sensitivity of a layer is the KL divergence of the network's output with only that layer in
INT8. Layers are moved to floating point in descending order of sensitivity per multiply-accumulate.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from calib.placement import Point, int8_share
from runtime.graph.heads import outputs_probabilities
from runtime.graph.model import first_output, open_session, run_batches

__all__ = ["Fallback", "HeldOut", "Trial", "expected_loss", "measure_sensitivity", "meet_budget"]

log = logging.getLogger(__name__)

HeldOut: TypeAlias = Mapping[str, Callable[[], Iterator[NDArray[np.float32]]]]
"""Kind of image → batches of its held-out images, normalized, float32 (N, 3, H, W)."""
Quantize: TypeAlias = Callable[[Sequence[Point]], onnx.ModelProto]
"""Returns the INT8 graph for the given points."""

_SENSITIVITY_BATCHES = 8
"""Number of batches of each kind on which sensitivities are measured."""
_MIN_PROBABILITY = float(np.finfo(np.float32).tiny)
_MAX_RETRIES = 8
"""Number of floating-point layers that are retried in INT8 once the budget is met."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One choice of layers and its measured cost."""

    floating: tuple[str, ...]
    """Nodes kept in floating point for the budget."""
    int8_share: float
    """Share of the multiply-accumulates in INT8, 0 to 1."""
    losses: dict[str, float]
    """Kind of image → expected loss of top-1 accuracy, 0 to 1."""
    agreement: float
    """Share of all held-out images with the same top-1 class as the float32 network, 0 to 1."""

    @property
    def loss(self) -> float:
        """Largest loss among the kinds of images, 0 to 1."""
        return max(self.losses.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """The layers kept in floating point for a budget, and the search that found them."""

    points: tuple[Point, ...]
    """All points; those kept in floating point are no longer `int8`."""
    budget: float
    """Allowed loss of top-1 accuracy, 0 to 1."""
    trials: tuple[Trial, ...]
    """Every measured choice, in order."""
    chosen: Trial
    """The choice that was made."""
    sensitivity: dict[str, float]
    """Node → KL divergence with only this node in INT8, in nats; empty if all layers can be
    INT8."""

    @property
    def met(self) -> bool:
        """Whether the loss is within the budget."""
        return self.chosen.loss <= self.budget


def expected_loss(reference_NK: NDArray[np.floating], logits_NK: NDArray[np.floating]) -> float:
    """Return the expected loss of top-1 accuracy, 0 to 1, by the reference's probabilities.

    Args:
        reference_NK: logits of the float32 network.
        logits_NK: logits of the quantized network.
    """
    chances = np.exp(_log_softmax(reference_NK))
    rows = np.arange(len(chances))
    return float(np.mean(chances.max(1) - chances[rows, logits_NK.argmax(1)]))


def measure_sensitivity(
    quantize: Quantize,
    points: Sequence[Point],
    batches: Sequence[NDArray[np.float32]],
    reference: Sequence[NDArray[np.floating]],
    progress: Callable[[int], None] | None = None,
    *,
    probabilities: bool = False,
) -> dict[str, float]:
    """Measure each quantized layer alone.

    Args:
        quantize: returns the INT8 graph for the given points.
        points: points with `int8` set are measured.
        batches: images.
        reference: the float32 network's logits of each batch.
        progress: called after each layer with 1.
        probabilities: whether the graphs output probabilities instead of logits.

    Returns:
        Node → mean KL divergence of the output, in nats; inf if it is not finite.
    """
    expected = np.concatenate(reference)
    sensitivity = {}
    for point in points:
        if point.int8:
            found = _logits_of(run_batches(quantize([point]), batches), probabilities)
            mean = float(np.mean(_kl_divergence(expected, found)))
            sensitivity[point.node] = mean if np.isfinite(mean) else float("inf")
            if progress:
                progress(1)
    return sensitivity


def meet_budget(
    model: onnx.ModelProto,
    quantize: Quantize,
    points: Sequence[Point],
    budget: float,
    held: HeldOut,
    progress: Callable[[str, int], None] | None = None,
) -> Fallback:
    """Keep layers in floating point until the loss on held-out images is within the budget.

    Args:
        model: the float32 graph.
        quantize: returns the INT8 graph for the given points.
        points: all points of the graph.
        budget: allowed expected loss of top-1 accuracy on each kind of image, 0 to 1.
        held: held-out images.
        progress: called with the stage, `budget` or `sensitivity`, and the number of images or
            layers just done.
    """
    search = _Search(model, quantize, points, held, progress)
    sensitivity: dict[str, float] = {}
    if search.measure(()).loss > budget:
        sensitivity = search.sensitivity()
        macs = {point.node: max(point.macs, 1) for point in points}
        order = sorted(sensitivity, key=lambda node: sensitivity[node] / macs[node], reverse=True)
        _bisect(search, order, budget)
        _retry_int8(search, macs, budget)
    chosen = search.best_within(budget) or min(search.trials, key=lambda trial: trial.loss)
    return Fallback(
        points=tuple(_mark_kept(point, chosen, sensitivity) for point in points),
        budget=budget,
        trials=tuple(search.trials),
        chosen=chosen,
        sensitivity=sensitivity,
    )


class _Search:
    """Measures choices of layers. Each choice is measured once."""

    def __init__(
        self,
        model: onnx.ModelProto,
        quantize: Quantize,
        points: Sequence[Point],
        held: HeldOut,
        progress: Callable[[str, int], None] | None,
    ) -> None:
        self.trials: list[Trial] = []
        self._quantize, self._points, self._held = quantize, points, held
        self._progress = progress or (lambda stage, done: None)
        session = open_session(model)
        self._probabilities = outputs_probabilities(model)
        self._reference: dict[str, list[NDArray[np.floating]]] = {}
        self._sample: list[NDArray[np.float32]] = []
        self._sample_reference: list[NDArray[np.floating]] = []
        for kind, batches in held.items():
            self._reference[kind] = []
            for place, batch in enumerate(batches()):
                logits = _logits_of(first_output(session, batch), self._probabilities)
                self._reference[kind].append(logits)
                if place < _SENSITIVITY_BATCHES:
                    self._sample.append(batch)
                    self._sample_reference.append(logits)

    def measure(self, floating: Sequence[str]) -> Trial:
        """Return the trial with these nodes in floating point. Each choice is measured once."""
        for trial in self.trials:
            if set(trial.floating) == set(floating):
                return trial
        points = [dataclasses.replace(point, int8=point.int8 and point.node not in floating) for point in self._points]
        session = open_session(self._quantize(points))
        losses, same, count = {}, 0, 0
        for kind, batches in self._held.items():
            logits = []
            for batch in batches():
                logits.append(_logits_of(first_output(session, batch), self._probabilities))
                self._progress("budget", len(batch))
            reference, found = np.concatenate(self._reference[kind]), np.concatenate(logits)
            losses[kind] = expected_loss(reference, found) if np.isfinite(found).all() else 1.0
            same += int((reference.argmax(1) == found.argmax(1)).sum())
            count += len(found)
        trial = Trial(floating=tuple(floating), int8_share=int8_share(points), losses=losses, agreement=same / count)
        log.debug("%d layers kept in floating point: the loss is %.2f points", len(floating), 100 * trial.loss)
        self.trials.append(trial)
        return trial

    def best_within(self, budget: float) -> Trial | None:
        """Return the measured trial within the budget with the largest INT8 share, or None.

        Trials with equal shares, for example of layers without known shapes, differ in the number
        of layers.
        """
        within = [trial for trial in self.trials if trial.loss <= budget]
        return max(within, key=lambda trial: (trial.int8_share, -len(trial.floating)), default=None)

    def sensitivity(self) -> dict[str, float]:
        return measure_sensitivity(
            self._quantize,
            self._points,
            self._sample,
            self._sample_reference,
            lambda done: self._progress("sensitivity", done),
            probabilities=self._probabilities,
        )


def _bisect(search: _Search, order: Sequence[str], budget: float) -> None:
    """Find the number of most sensitive layers to keep in floating point; one stays in INT8."""
    most = len(order) - 1
    low, high = 0, 1
    while high < most and search.measure(order[:high]).loss > budget:
        low, high = high, 2 * high
    high = min(high, most)
    while high - low > 1:
        middle = (low + high) // 2
        if search.measure(order[:middle]).loss > budget:
            low = middle
        else:
            high = middle
    search.measure(order[:high])


def _retry_int8(search: _Search, macs: Mapping[str, int], budget: float) -> None:
    """Retry the largest floating-point layers in INT8: sensitivities ignore interactions."""
    best = search.best_within(budget)
    if best is None:
        return
    floating = list(best.floating)
    for node in sorted(floating, key=lambda node: macs[node], reverse=True)[:_MAX_RETRIES]:
        fewer = [name for name in floating if name != node]
        if search.measure(fewer).loss <= budget:
            floating = fewer


def _mark_kept(point: Point, chosen: Trial, sensitivity: Mapping[str, float]) -> Point:
    if point.node not in chosen.floating:
        return point
    change = f"in INT8 alone it changes the output by {sensitivity[point.node]:.2g} nats"
    return dataclasses.replace(point, int8=False, reason=f"kept in floating point for the budget: {change}")


def _logits_of(outputs_NK: NDArray[np.floating], probabilities: bool) -> NDArray[np.floating]:
    """Return logits: the outputs, or the logarithms of probabilities, whose softmax is the same."""
    if not probabilities:
        return outputs_NK
    logits: NDArray[np.floating] = np.log(np.maximum(outputs_NK, _MIN_PROBABILITY))
    return logits


def _log_softmax(logits_NK: NDArray[np.floating]) -> NDArray[np.float64]:
    shifted = logits_NK.astype(np.float64) - logits_NK.max(1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def _kl_divergence(reference_NK: NDArray[np.floating], logits_NK: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the KL divergence of each image, (N,), in nats."""
    log_p, log_q = _log_softmax(reference_NK), _log_softmax(logits_NK)
    divergence: NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(1)
    return divergence
