"""FP32 ONNX → reduced precision that agrees with it: convert, verify, give back to FP32 what it takes.

Nodes that would overflow stay in FP32 from the start. Where the logits still do not agree, the
nodes that add most error follow, a few more each time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from calib.precision import Decision, losses, overflows, to_reduced
from export.verify import TOLERANCE, Parity, agrees, compare
from runtime.graph.collect import collect
from runtime.graph.compare import graph_errors
from runtime.graph.rounding import rounded_name, with_roundings

__all__ = ["Reduced", "reduce_precision"]

log = logging.getLogger(__name__)

Batches = Callable[[], Iterator[NDArray[np.float32]]]
Run = Callable[[onnx.ModelProto], NDArray[np.float32]]

_STEPS = (4, 8, 16, 32, 64)
"""How many nodes are given back to FP32 for their loss, attempt by attempt."""
_FEW = 2
"""Images that errors are measured on, tensor by tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduced:
    """A graph in reduced precision."""

    model: onnx.ModelProto
    """float32 at its ends."""
    rounded: onnx.ModelProto
    """The same with its roundings done in float32, for a CPU."""
    decisions: tuple[Decision, ...]
    """What stays in FP32."""
    parity: Parity
    """Against the float32 graph."""


def reduce_precision(
    model: onnx.ModelProto,
    precision: str,
    *,
    amax: dict[str, float],
    logits_NK: NDArray[np.float32],
    batches: Batches,
    run: Run,
) -> Reduced:
    """Converts `model`, keeping in FP32 what overflows or loses too much on real images.

    Args:
        model: the float32 graph.
        precision: `fp16` or `bf16`.
        amax: largest magnitudes of at least the deciding tensors; completed where one overflows.
        logits_NK: of `model` on all images.
        batches: the images, from the start each time.
        run: runs a float32 graph on all of them.
    """
    kept: list[Decision] = []
    if precision == "fp16" and overflows(model, amax):
        amax.update(collect(model, batches()).amax)
        kept = overflows(model, amax)
    reduced = _attempt(model, precision, kept, logits_NK, run)
    for count in _STEPS:
        if agrees(reduced.parity, TOLERANCE[precision]):
            break
        few = next(batches())[:_FEW]
        errors = graph_errors(model, reduced.rounded, few, rounded_name)
        names = {decision.node for decision in kept}
        more = [decision for decision in losses(model, errors, amax, count) if decision.node not in names]
        if not more:
            break
        log.info("%s does not agree yet; %d more nodes stay in FP32", precision, len(more))
        kept += more
        reduced = _attempt(model, precision, kept, logits_NK, run)
    return reduced


def _attempt(
    model: onnx.ModelProto, precision: str, kept: list[Decision], logits_NK: NDArray[np.float32], run: Run
) -> Reduced:
    converted = to_reduced(model, precision, kept)
    rounded = with_roundings(converted)
    return Reduced(model=converted, rounded=rounded, decisions=tuple(kept), parity=compare(logits_NK, run(rounded)))
