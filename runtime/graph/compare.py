"""Compare two graphs tensor by tensor, in the order of computation.

The error of a tensor is its largest |Δ| divided by its largest magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from runtime.graph.model import open_session, tensor_types, with_outputs

__all__ = ["TensorError", "added_error", "first_above", "graph_errors", "relative_error", "tensor_values"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorError:
    """The error of one tensor."""

    node: str
    """Name of the node that computes it; if a network is compared with its graph, path of the
    module."""
    op: str
    """The node's operator; if a network is compared with its graph, class of the module."""
    tensor: str
    """Name of the tensor in the graph."""
    error: float
    """Largest |Δ| divided by the largest magnitude; inf if a value is not finite."""
    added: float
    """Part of `error` that the node adds: `error` minus the largest error among the node's inputs,
    or minus the error of the previous module; at least 0."""


def first_above(errors: list[TensorError], tolerance: float) -> TensorError | None:
    """Return the first tensor with an error above `tolerance`, or None."""
    return next((entry for entry in errors if not entry.error <= tolerance), None)


def graph_errors(
    reference: onnx.ModelProto,
    candidate: onnx.ModelProto,
    batch: NDArray[Any],
    candidate_name: Callable[[str], str] = str,
) -> list[TensorError]:
    """Compare each float32 tensor that both graphs compute.

    Args:
        reference: a float32 graph.
        candidate: a float32 graph with the same input.
        batch: input of both, a few images: all tensors are held in memory.
        candidate_name: returns the name in `candidate` of a tensor of `reference`. If `candidate`
            has no such tensor, the tensor with the same name is compared.
    """
    pairs = _shared_tensors(reference, candidate, candidate_name)
    expected = tensor_values(reference, list(pairs), batch)
    found = tensor_values(candidate, list(pairs.values()), batch)
    errors: dict[str, float] = {}
    entries = []
    for node in reference.graph.node:
        for name in node.output:
            if name not in pairs or expected[name].dtype != np.float32:
                continue
            error = errors[name] = relative_error(expected[name], found[pairs[name]])
            before = max((errors.get(source, 0.0) for source in node.input), default=0.0)
            added = added_error(error, before)
            entries.append(TensorError(node=node.name, op=node.op_type, tensor=name, error=error, added=added))
    return entries


def tensor_values(model: onnx.ModelProto, names: list[str], batch: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Run `model` on `batch` and return the named tensors."""
    kinds = {name: kind.elem_type for name, kind in tensor_types(model).items()}
    session = open_session(with_outputs(model, names, kinds))
    return dict(zip(names, session.run(names, {model.graph.input[0].name: batch}), strict=True))


def relative_error(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """Return max |Δ| ÷ max |expected|; inf if a value is not finite or the shapes differ."""
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


def added_error(error: float, before: float) -> float:
    """Return the increase from `before` to `error`; 0 if there is none or both are infinite."""
    return max(0.0, error - before) if np.isfinite(before) else 0.0


def _shared_tensors(
    reference: onnx.ModelProto, candidate: onnx.ModelProto, candidate_name: Callable[[str], str]
) -> dict[str, str]:
    """Return the name in `candidate` of each node output that both graphs compute."""
    computed = {name for node in candidate.graph.node for name in node.output}
    outputs = {value.name for value in candidate.graph.output}
    pairs = {}
    for node in reference.graph.node:
        for name in node.output:
            renamed = name if name in outputs else candidate_name(name)
            other = renamed if renamed in computed else name  # tensors that stay in float32 keep their name
            if other in computed:
                pairs[name] = other
    return pairs
