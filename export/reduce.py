"""Convert an FP32 graph to FP16 or BF16, and keep nodes in FP32 until the logits agree.

Nodes that would overflow stay in FP32 from the start. While the logits do not agree, the nodes that
add the largest errors are kept in FP32 too, more of them in each attempt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from calib.precision import Decision, losses, overflows, to_reduced
from export.verify import FEW_IMAGES, TOLERANCE, Parity, agrees, compare
from runtime.graph.collect import collect
from runtime.graph.compare import graph_errors
from runtime.graph.rounding import rounded_name, with_roundings

__all__ = ["Reduced", "reduce_precision"]

log = logging.getLogger(__name__)

Batches = Callable[[], Iterator[NDArray[np.float32]]]
Run = Callable[[onnx.ModelProto], NDArray[np.float32]]

_ATTEMPTS = (4, 8, 16, 32, 64)
"""Number of nodes that are kept in FP32 because of their error, for each attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduced:
    """A graph in reduced precision."""

    model: onnx.ModelProto
    """The graph; its input and output are float32."""
    rounded: onnx.ModelProto
    """The same graph in float32 with all roundings, to run on a CPU."""
    decisions: tuple[Decision, ...]
    """Nodes that stay in FP32."""
    parity: Parity
    """Comparison with the float32 graph."""


def reduce_precision(
    model: onnx.ModelProto,
    precision: str,
    *,
    amax: dict[str, float],
    logits_NK: NDArray[np.float32],
    batches: Batches,
    run: Run,
) -> Reduced:
    """Convert `model`, except nodes that overflow or lose too much accuracy on real images.

    Args:
        model: the float32 graph.
        precision: `fp16` or `bf16`.
        amax: largest magnitude of at least the deciding tensors. If one overflows, all tensors are
            measured and added to it.
        logits_NK: logits of `model` for all images.
        batches: returns an iterator over all images.
        run: returns the logits of a float32 graph for all images.
    """
    kept: list[Decision] = []
    if precision == "fp16" and overflows(model, amax):
        amax.update(collect(model, batches()).amax)
        kept = overflows(model, amax)
    reduced = _attempt(model, precision, kept, logits_NK, run)
    for count in _ATTEMPTS:
        if agrees(reduced.parity, TOLERANCE[precision]):
            break
        few = next(batches())[:FEW_IMAGES]
        errors = graph_errors(model, reduced.rounded, few, rounded_name)
        names = {decision.node for decision in kept}
        more = [decision for decision in losses(model, errors, amax, count) if decision.node not in names]
        if not more:
            break
        log.info("the %s graph does not agree yet; %d more nodes stay in FP32", precision.upper(), len(more))
        kept += more
        reduced = _attempt(model, precision, kept, logits_NK, run)
    return reduced


def _attempt(
    model: onnx.ModelProto, precision: str, kept: list[Decision], logits_NK: NDArray[np.float32], run: Run
) -> Reduced:
    converted = to_reduced(model, precision, kept)
    rounded = with_roundings(converted)
    return Reduced(model=converted, rounded=rounded, decisions=tuple(kept), parity=compare(logits_NK, run(rounded)))
