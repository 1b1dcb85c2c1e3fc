"""Where two graphs part: tensor by tensor, in the order they are computed.

Errors are the largest |Δ| of a tensor as a share of its largest magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from runtime.graph.model import open_session, tensor_types, with_outputs

__all__ = ["TensorError", "first_beyond", "graph_errors", "relative_error", "tensors_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorError:
    """How far one tensor is off."""

    node: str
    """The node that makes it; of a network and its graph, the module."""
    op: str
    """The node's operator; of a network and its graph, the module's class."""
    tensor: str
    """Its name in the graph."""
    error: float
    """Largest |Δ| as a share of the largest magnitude; inf where it is not finite."""
    added: float
    """`error` less the largest error among the node's inputs; of a module, less that of the one before."""


def first_beyond(errors: list[TensorError], tolerance: float) -> TensorError | None:
    """Returns the first tensor whose error passes `tolerance`."""
    return next((entry for entry in errors if not entry.error <= tolerance), None)


def graph_errors(
    reference: onnx.ModelProto,
    candidate: onnx.ModelProto,
    batch: NDArray[Any],
    candidate_name: Callable[[str], str] = str,
) -> list[TensorError]:
    """Compares every float tensor that both graphs make.

    Args:
        reference: a float32 graph.
        candidate: a graph of the same input, float32 too.
        batch: what both are run on; all tensors are held in memory, so a few images.
        candidate_name: what a tensor of `reference` is called in `candidate`.
    """
    made = {name for node in candidate.graph.node for name in node.output}
    ends = {value.name for value in candidate.graph.output}
    pairs = {}
    for node in reference.graph.node:
        for name in node.output:
            renamed = name if name in ends else candidate_name(name)
            other = renamed if renamed in made else name  # what stays in float32 keeps its name
            if other in made:
                pairs[name] = other
    expected = tensors_of(reference, list(pairs), batch)
    found = tensors_of(candidate, list(pairs.values()), batch)
    errors: dict[str, float] = {}
    entries = []
    for node in reference.graph.node:
        for name in node.output:
            if name not in pairs or expected[name].dtype != np.float32:
                continue
            errors[name] = relative_error(expected[name], found[pairs[name]])
            before = max((errors.get(source, 0.0) for source in node.input), default=0.0)
            entries.append(
                TensorError(
                    node=node.name, op=node.op_type, tensor=name, error=errors[name], added=_less(errors[name], before)
                )
            )
    return entries


def tensors_of(model: onnx.ModelProto, names: list[str], batch: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Runs `model` on `batch` and returns the tensors of those names."""
    kinds = {name: kind.elem_type for name, kind in tensor_types(model).items()}
    session = open_session(with_outputs(model, names, kinds))
    return dict(zip(names, session.run(names, {model.graph.input[0].name: batch}), strict=True))


def relative_error(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """Returns the largest |Δ| as a share of the largest magnitude; inf where something is not finite."""
    if expected.size == 0:
        return 0.0
    if expected.shape != found.shape:
        return float("inf")
    with np.errstate(invalid="ignore", over="ignore"):
        difference = float(np.abs(found.astype(np.float64) - expected).max())
    scale = float(np.abs(expected).max())
    if not np.isfinite(difference) or not np.isfinite(scale):
        return float("inf")
    return difference / scale if scale else difference


def _less(error: float, before: float) -> float:
    return 0.0 if not np.isfinite(before) else max(0.0, error - before)
