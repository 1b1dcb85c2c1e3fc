"""Record what each BatchNorm did to its tensor, to estimate its statistics again later.

A BatchNorm y = γ (z − μ) / √(σ² + ε) + β leaves a tensor y whose channels have, on the training
images, the mean β and the variance γ² σ² / (σ² + ε). A folded BatchNorm is no longer visible in the
graph, but these numbers, stored in the file's metadata, suffice to normalize y again for other
images: with the mean m and variance v of y on those images,

    y' = β + |γ| (y − m) / √(v + e),   e = γ² ε / (σ² + ε)

is what the BatchNorm outputs after its μ and σ² were estimated on them. e is ε in units of y².

The record also contains the moments of y on the clean images that the export was verified on. They
differ from those of the training images, which were augmented: only a difference from the clean
images is a shift.

Shape suffixes: C channels.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from runtime.errors import ModelFileError
from runtime.graph.affine import can_rescale
from runtime.graph.edit import constant_of
from runtime.graph.structure import metadata

__all__ = ["NORMS_KEY", "Moments", "Norm", "adaptable", "find_norms", "norms_to_json", "read_norms"]

log = logging.getLogger(__name__)

NORMS_KEY = "advprop.norms"
"""Key of the norms' JSON in an ONNX file's `metadata_props`."""

FORMAT = "advprop.norms/1"
_SMALL = 1e-3
"""Smallest γ² in a distance, relative to the median of the tensor's channels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Mean and variance of each channel of a tensor, over some images and all positions."""

    mean_C: NDArray[np.float64]
    variance_C: NDArray[np.float64]
    noise: float
    """Expected distance (see `Norm.distance`) from the moments of infinitely many such images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """What a BatchNorm did to the channels of its output tensor."""

    scale_C: NDArray[np.float64]
    """|γ|."""
    mean_C: NDArray[np.float64]
    """β, the mean on the training images."""
    epsilon_C: NDArray[np.float64]
    """e = γ² ε / (σ² + ε), from 0 to γ²."""
    clean: Moments | None = None
    """Moments on clean images; None if they were not measured."""

    @property
    def variance(self) -> NDArray[np.float64]:
        """Variance of each channel on the training images, γ² − e."""
        return np.maximum(self.scale_C**2 - self.epsilon_C, 0.0)

    def distance(self, mean_C: NDArray[np.float64], variance_C: NDArray[np.float64]) -> float:
        """Return the size of differences of moments: the mean of Δmean² / γ² + Δvariance² / 2γ⁴.

        For small differences it is twice the Kullback–Leibler divergence of normal distributions.
        Channels with a γ close to zero count as channels with a small one.

        Args:
            mean_C: squared differences of the means, or their variances.
            variance_C: squared differences of the variances, or their variances.
        """
        square_C = self.scale_C**2
        square_C = np.maximum(square_C, max(_SMALL * float(np.median(square_C)), float(np.finfo(np.float32).tiny)))
        return float(np.mean(mean_C / square_C + variance_C / (2 * square_C**2)))


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
        gamma_C, beta_C, _, variance_C = (np.asarray(value, np.float64) for value in constants)
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        total_C = variance_C + epsilon
        # A channel without variance and without ε is constant. Its variance counts as ε: it never adapts.
        share_C = np.divide(epsilon, total_C, out=np.ones_like(total_C), where=total_C > 0)
        found[str(node.outputs[0].name)] = Norm(scale_C=np.abs(gamma_C), mean_C=beta_C, epsilon_C=gamma_C**2 * share_C)
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
    """Return norms as JSON.

    `tensors` has |γ|, β and e of each tensor, `clean` its mean, variance and noise on clean images.
    Rows of channels are base64 of little-endian float32.
    """
    content: dict[str, Any] = {"format": FORMAT, "tensors": {}, "clean": {}}
    for name, norm in norms.items():
        content["tensors"][name] = _encode(norm.scale_C, norm.mean_C, norm.epsilon_C)
        if norm.clean is not None:
            content["clean"][name] = [_encode(norm.clean.mean_C, norm.clean.variance_C), norm.clean.noise]
    return json.dumps(content, separators=(",", ":"))


def read_norms(model: Any) -> dict[str, Norm]:
    """Return the norms in the metadata of an `onnx.ModelProto`, by tensor; {} if it has none.

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
        norms = {}
        for name, rows in content["tensors"].items():
            scale_C, mean_C, epsilon_C = _decode(rows, 3)
            norms[str(name)] = Norm(scale_C=scale_C, mean_C=mean_C, epsilon_C=epsilon_C)
        for name, (rows, noise) in content["clean"].items():
            mean_C, variance_C = _decode(rows, 2)
            clean = Moments(mean_C=mean_C, variance_C=variance_C, noise=float(noise))
            norms[name] = replace(norms[name], clean=clean)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFileError(
            f"the model's {NORMS_KEY} cannot be read ({error})", fix="export the model again"
        ) from error
    return norms


def _encode(*rows_C: NDArray[np.float64]) -> str:
    return base64.b64encode(np.stack(rows_C).astype("<f4").tobytes()).decode()


def _decode(text: str, rows: int) -> NDArray[np.float64]:
    found = np.frombuffer(base64.b64decode(text, validate=True), "<f4").reshape(rows, -1).astype(np.float64)
    if not found.size or not np.isfinite(found).all():
        raise ValueError("expected finite numbers")
    return found
