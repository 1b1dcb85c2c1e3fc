"""Record what each BatchNorm did to its tensor, so that its statistics can be re-estimated later.

A BatchNorm y = γ (z − μ) / √(σ² + ε) + β leaves a tensor y whose channels have, on the training
images, the mean β and the variance γ² σ² / (σ² + ε). A folded BatchNorm is no longer visible in the
graph, but these numbers, stored in the file's metadata, suffice to normalize y again for other
images: with the mean m and variance s² of y on those images,

    y' = β + |γ| (y − m) / √(s² + e),   e = γ² ε / (σ² + ε)

is what the BatchNorm outputs after its μ and σ² were estimated on them. e is ε in units of y².
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from runtime.errors import ModelFileError
from runtime.graph.affine import can_rescale
from runtime.graph.edit import constant_of
from runtime.graph.structure import metadata

__all__ = ["NORMS_KEY", "Norm", "adaptable", "find_norms", "norms_to_json", "read_norms"]

log = logging.getLogger(__name__)

NORMS_KEY = "advprop.norms"
"""Key of the norms' JSON in an ONNX file's `metadata_props`."""

FORMAT = "advprop.norms/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """What a BatchNorm did to the channels of its output tensor; arrays are float64 (channels,)."""

    scale_C: NDArray[np.float64]
    """|γ|."""
    mean_C: NDArray[np.float64]
    """β, the mean on the training images."""
    epsilon_C: NDArray[np.float64]
    """e = γ² ε / (σ² + ε), from 0 to γ²."""

    @property
    def variance_C(self) -> NDArray[np.float64]:
        """Variance on the training images, γ² − e."""
        return np.maximum(self.scale_C**2 - self.epsilon_C, 0.0)


def find_norms(graph: ir.Graph) -> dict[str, Norm]:
    """Return the norms of all BatchNormalization nodes with constant parameters, by output tensor.

    Folding passes give the output of a BatchNormalization to the node that replaces it, so call
    this before they run.
    """
    found = {}
    for node in graph:
        if node.op_type != "BatchNormalization":
            continue
        constants = [constant_of(value) for value in node.inputs[1:5]]
        if len(constants) != 4 or any(value is None for value in constants):
            continue
        gamma, beta, _, variance = (np.asarray(value, np.float64) for value in constants)
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        total = variance + epsilon
        # A channel without variance and without ε is constant. It counts as ε only: it never adapts.
        share = np.divide(epsilon, total, out=np.ones_like(total), where=total > 0)
        found[str(node.outputs[0].name)] = Norm(scale_C=np.abs(gamma), mean_C=beta, epsilon_C=gamma**2 * share)
    return found


def adaptable(graph: ir.Graph, norms: Mapping[str, Norm]) -> dict[str, Norm]:
    """Return the norms whose tensors `runtime.graph.affine.rescale` can change; log the others."""
    values = {value.name: value for node in graph for value in node.outputs}
    found = {}
    for name, norm in norms.items():
        if name in values and can_rescale(values[name], len(norm.mean_C)):
            found[name] = norm
        else:
            log.info("the BatchNorm of %s cannot be adapted: it is not folded into constants of its own", name)
    return found


def norms_to_json(norms: Mapping[str, Norm]) -> str:
    """Return norms as JSON: for each tensor |γ|, β and e, as base64 of little-endian float32 (3, C)."""
    content = {}
    for name, norm in norms.items():
        rows = np.stack([norm.scale_C, norm.mean_C, norm.epsilon_C]).astype("<f4")
        content[name] = base64.b64encode(rows.tobytes()).decode()
    return json.dumps({"format": FORMAT, "tensors": content}, separators=(",", ":"))


def read_norms(model: onnx.ModelProto | Any) -> dict[str, Norm]:
    """Return the norms in a model's metadata, by tensor; {} if it has none.

    Raises:
        ModelFileError: the metadata is damaged, or of a later version.
    """
    text = metadata(model, NORMS_KEY)
    if not text:
        return {}
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT!r}")
        return {str(name): _parse(rows) for name, rows in content["tensors"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFileError(
            f"the model's {NORMS_KEY} cannot be read ({error})", fix="export the model again"
        ) from error


def _parse(text: str) -> Norm:
    rows = np.frombuffer(base64.b64decode(text, validate=True), "<f4").reshape(3, -1).astype(np.float64)
    if not np.isfinite(rows).all() or (rows[[0, 2]] < 0).any():
        raise ValueError("expected finite numbers, and none below 0 for |γ| and e")
    return Norm(scale_C=rows[0], mean_C=rows[1], epsilon_C=rows[2])
