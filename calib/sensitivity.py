"""An accuracy budget: which layers go back to floating point so that the others may stay in INT8.

Images need no labels. What INT8 costs is told by the float32 network's own probabilities p: an image whose most
likely class changes from a to b costs p(a) − p(b), the expected change of top-1 accuracy if p is calibrated. It
is much less noisy than counting changed images: most changes are between classes that were nearly as likely.

How sensitive a layer is: the KL divergence of the network's output with that layer alone in INT8. Layers go back
in order of divergence saved for each multiply-accumulate given up.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from calib.placement import Point, int8_share
from runtime.graph.model import open_session

__all__ = ["Fallback", "Held", "Trial", "expected_loss", "keep_budget", "sensitivities"]

log = logging.getLogger(__name__)

Held: TypeAlias = Mapping[str, Callable[[], Iterator[NDArray[np.float32]]]]
"""Kind of image → its held-out images, normalized, float32 (N, 3, H, W), a few at a time."""
Quantize: TypeAlias = Callable[[Sequence[Point]], onnx.ModelProto]

_FEW_BATCHES = 8
"""Batches of each kind that sensitivities are measured on."""
_RETURNS = 8
"""Layers that are tried in INT8 again once the budget holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One choice of layers, measured."""

    floating: tuple[str, ...]
    """Nodes given back to floating point."""
    int8_share: float
    """Share of the multiply-accumulates in INT8, 0 to 1."""
    losses: dict[str, float]
    """Kind of image → expected loss of top-1 accuracy, 0 to 1."""
    agreement: float
    """Share of all held-out images with the float32 top-1 class, 0 to 1."""

    @property
    def loss(self) -> float:
        """That of the kind that loses most."""
        return max(self.losses.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """How a budget was kept."""

    points: tuple[Point, ...]
    """All points, those given back no longer `int8`."""
    budget: float
    """What may be lost, 0 to 1."""
    trials: tuple[Trial, ...]
    """Everything that was measured, in order."""
    chosen: Trial
    """The one that was taken."""
    sensitivity: dict[str, float]
    """Node → KL divergence with it alone in INT8, nats; empty where all could stay."""

    @property
    def met(self) -> bool:
        """Whether the budget holds."""
        return self.chosen.loss <= self.budget


def expected_loss(reference_NK: NDArray[np.floating], logits_NK: NDArray[np.floating]) -> float:
    """Returns the expected loss of top-1 accuracy, 0 to 1, by the probabilities of the reference.

    Args:
        reference_NK: logits of the float32 network.
        logits_NK: those of the other.
    """
    chances = np.exp(_log_softmax(reference_NK))
    rows = np.arange(len(chances))
    return float(np.mean(chances.max(1) - chances[rows, logits_NK.argmax(1)]))


def sensitivities(
    quantize: Quantize,
    points: Sequence[Point],
    batches: Sequence[NDArray[np.float32]],
    reference: Sequence[NDArray[np.float32]],
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Measures each quantized layer alone.

    Args:
        quantize: makes the INT8 graph of some points.
        points: those that are `int8` are measured.
        batches: images.
        reference: the float32 network's logits of each.
        progress: called after each layer with 1.

    Returns:
        Node → mean KL divergence of the output, nats; inf where it is not finite.
    """
    found = {}
    for point in points:
        if point.int8:
            logits = _logits(quantize([point]), batches)
            divergences = [_kl(*pair) for pair in zip(reference, logits, strict=True)]
            mean = float(np.mean(np.concatenate(divergences)))
            found[point.node] = mean if np.isfinite(mean) else float("inf")
            if progress:
                progress(1)
    return found


def keep_budget(
    model: onnx.ModelProto,
    quantize: Quantize,
    points: Sequence[Point],
    budget: float,
    held: Held,
    progress: Callable[[str, int], None] | None = None,
) -> Fallback:
    """Gives layers back to floating point until the loss on held-out images is within the budget.

    Args:
        model: the float32 graph.
        quantize: makes the INT8 graph of some points.
        points: all of them.
        budget: expected loss of top-1 accuracy that is allowed on each kind, 0 to 1.
        held: the held-out images.
        progress: called with a stage's name, `budget` or `sensitivity`, and one more image or layer done.
    """
    search = _Search(model, quantize, points, held, progress)
    whole = search.tried(())
    order: list[str] = []
    sensitivity: dict[str, float] = {}
    if whole.loss > budget:
        sensitivity = search.sensitivities()
        macs = {point.node: max(point.macs, 1) for point in points}
        order = sorted(sensitivity, key=lambda node: sensitivity[node] / macs[node], reverse=True)
        _bisect(search, order, budget)
        _return_some(search, order, macs, budget)
    within = [trial for trial in search.trials if trial.loss <= budget]
    chosen = (
        max(within, key=lambda trial: trial.int8_share) if within else min(search.trials, key=lambda trial: trial.loss)
    )
    return Fallback(
        points=tuple(_given_back(point, chosen, sensitivity) for point in points),
        budget=budget,
        trials=tuple(search.trials),
        chosen=chosen,
        sensitivity=sensitivity,
    )


class _Search:
    """Measures choices of layers, each once."""

    def __init__(
        self,
        model: onnx.ModelProto,
        quantize: Quantize,
        points: Sequence[Point],
        held: Held,
        progress: Callable[[str, int], None] | None,
    ) -> None:
        self.trials: list[Trial] = []
        self._quantize, self._points, self._held = quantize, points, held
        self._progress = progress or (lambda stage, done: None)
        session = open_session(model)
        self._reference: dict[str, list[NDArray[np.float32]]] = {}
        self._few: list[NDArray[np.float32]] = []
        self._few_reference: list[NDArray[np.float32]] = []
        for kind, batches in held.items():
            self._reference[kind] = []
            for place, batch in enumerate(batches()):
                logits = _run(session, batch)
                self._reference[kind].append(logits)
                if place < _FEW_BATCHES:
                    self._few.append(batch)
                    self._few_reference.append(logits)

    def tried(self, floating: Sequence[str]) -> Trial:
        for trial in self.trials:
            if set(trial.floating) == set(floating):
                return trial
        points = [dataclasses.replace(point, int8=point.int8 and point.node not in floating) for point in self._points]
        session = open_session(self._quantize(points))
        losses, same, count = {}, 0, 0
        for kind, batches in self._held.items():
            logits = []
            for batch in batches():
                logits.append(_run(session, batch))
                self._progress("budget", len(batch))
            reference, found = np.concatenate(self._reference[kind]), np.concatenate(logits)
            losses[kind] = expected_loss(reference, found) if np.isfinite(found).all() else 1.0
            same += int((reference.argmax(1) == found.argmax(1)).sum())
            count += len(found)
        trial = Trial(floating=tuple(floating), int8_share=int8_share(points), losses=losses, agreement=same / count)
        log.debug("%d layers given back: %.2f points lost", len(floating), 100 * trial.loss)
        self.trials.append(trial)
        return trial

    def sensitivities(self) -> dict[str, float]:
        return sensitivities(
            self._quantize,
            self._points,
            self._few,
            self._few_reference,
            lambda done: self._progress("sensitivity", done),
        )


def _bisect(search: _Search, order: Sequence[str], budget: float) -> None:
    """Finds how many of the most sensitive layers must go; one always stays."""
    most = len(order) - 1
    low, high = 0, 1
    while high < most and search.tried(order[:high]).loss > budget:
        low, high = high, 2 * high
    high = min(high, most)
    while high - low > 1:
        middle = (low + high) // 2
        if search.tried(order[:middle]).loss > budget:
            low = middle
        else:
            high = middle
    search.tried(order[:high])


def _return_some(search: _Search, order: Sequence[str], macs: Mapping[str, int], budget: float) -> None:
    """Tries the largest of the layers that were given back in INT8 again: the search went by each alone."""
    within = [trial for trial in search.trials if trial.loss <= budget]
    if not within:
        return
    floating = list(max(within, key=lambda trial: trial.int8_share).floating)
    for node in sorted(floating, key=lambda node: macs[node], reverse=True)[:_RETURNS]:
        fewer = [name for name in floating if name != node]
        if search.tried(fewer).loss <= budget:
            floating = fewer


def _given_back(point: Point, chosen: Trial, sensitivity: Mapping[str, float]) -> Point:
    if point.node not in chosen.floating:
        return point
    reason = f"given back for the budget: alone in INT8 it changes the output by {sensitivity[point.node]:.2g} nats"
    return dataclasses.replace(point, int8=False, reason=reason)


def _logits(model: onnx.ModelProto, batches: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    session = open_session(model)
    return [_run(session, batch) for batch in batches]


def _run(session: Any, batch: NDArray[np.float32]) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: batch})[0]
    return logits


def _log_softmax(logits_NK: NDArray[np.floating]) -> NDArray[np.float64]:
    shifted = logits_NK.astype(np.float64) - logits_NK.max(1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def _kl(reference_NK: NDArray[np.floating], logits_NK: NDArray[np.floating]) -> NDArray[np.float64]:
    log_p, log_q = _log_softmax(reference_NK), _log_softmax(logits_NK)
    divergence: NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(1)
    return divergence
