"""Moments of normalized tensors on field images, and their mixture with those of the training images.

Shape suffixes: N images, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from runtime.adapt.sessions import Affine, per_image
from runtime.errors import DataError
from runtime.graph.model import open_session, tensor_types
from runtime.graph.norms import NORMS_KEY, Moments, Norm, norms_to_json, read_norms
from runtime.graph.structure import set_metadata, unused_prefix

__all__ = ["affine_of", "measure_moments", "moments_of", "with_clean_moments"]

_PREFIX = "advprop_moments/"


def moments_of(norm: Norm, mean_NC: NDArray[np.floating], square_NC: NDArray[np.floating]) -> Moments:
    """Return the moments of a tensor over all images.

    Args:
        norm: the tensor's norm.
        mean_NC: mean of each channel of each image.
        square_NC: mean square of each channel of each image.
    """
    mean_NC, square_NC = mean_NC.astype(np.float64), square_NC.astype(np.float64)
    mean_C = mean_NC.mean(0)
    deviation_NC = square_NC - 2 * mean_C * mean_NC + mean_C**2  # mean squared deviation from `mean_C`
    images = len(mean_NC)
    # The standard error of a mean over images; a single image does not show how images differ.
    noise = math.inf if images < 2 else norm.distance(mean_NC.var(0, ddof=1), deviation_NC.var(0, ddof=1)) / images
    return Moments(mean_C=mean_C, variance_C=np.maximum(deviation_NC.mean(0), 0.0), noise=noise)


def affine_of(norm: Norm, field: Moments, weight: float) -> Affine:
    """Return factor and shift that normalize a tensor with a mixture of statistics.

    The mixture is (1 − weight) · training + weight · field, for mean and variance, as in Schneider
    et al., "Improving robustness against common corruptions by covariate shift adaptation"
    (2006.16971), where weight = n / (N + n) with n field images and a prior of N training images.
    """
    mean_C = (1 - weight) * norm.mean_C + weight * field.mean_C
    variance_C = (1 - weight) * norm.variance + weight * field.variance_C + norm.epsilon_C
    is_used = (norm.scale_C > 0) & (variance_C > 0)
    scale_C = np.divide(norm.scale_C, np.sqrt(variance_C), out=np.ones_like(mean_C), where=is_used)
    return scale_C, np.where(is_used, norm.mean_C - scale_C * mean_C, 0.0)


def measure_moments(
    model: onnx.ModelProto, norms: Mapping[str, Norm], batches: Iterable[NDArray[Any]]
) -> dict[str, Moments]:
    """Return the moments of all normalized tensors, as the model computes them, from a single pass.

    Args:
        model: a float32 graph with one input.
        norms: its norms, by tensor.
        batches: inputs of the graph; no batch is kept after it has run.

    Raises:
        DataError: there is no batch.
    """
    prefix = unused_prefix(model.graph, _PREFIX)
    session = open_session(_with_moments(model, norms, prefix))
    source = session.get_inputs()[0].name
    names = [f"{prefix}{name}/{part}" for name in norms for part in ("mean", "square")]
    parts: list[list[NDArray[np.float32]]] = []
    for batch in batches:
        found = session.run(names, {source: batch})
        parts.append([per_image(values, len(batch)) for values in found])
    if not parts:
        raise DataError("cannot measure statistics without images: no batch was given")
    whole = [np.concatenate(values) for values in zip(*parts, strict=True)]
    pairs = zip(norms.items(), whole[::2], whole[1::2], strict=True)
    return {name: moments_of(norm, mean_NC, square_NC) for (name, norm), mean_NC, square_NC in pairs}


def with_clean_moments(model: onnx.ModelProto, batches: Iterable[NDArray[Any]]) -> onnx.ModelProto:
    """Return a copy whose norms contain the moments on clean images; `batches` are the model's inputs."""
    norms = read_norms(model)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    if norms:
        found = measure_moments(model, norms, batches)
        clean = {name: replace(norm, clean=found[name]) for name, norm in norms.items()}
        set_metadata(result, {NORMS_KEY: norms_to_json(clean)})
    return result


def _with_moments(model: onnx.ModelProto, norms: Mapping[str, Norm], prefix: str) -> onnx.ModelProto:
    """Return a copy that also outputs the mean and mean square of each tensor, per image."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    types = tensor_types(model)
    del probe.graph.output[1:]
    for name in norms:
        mean, square = (f"{prefix}{name}/{part}" for part in ("mean", "square"))
        if len(types[name].shape.dim) > 2:
            # ONNX Runtime computes both in the blocked layout of its convolutions.
            probe.graph.node.append(helper.make_node("GlobalAveragePool", [name], [mean]))
            probe.graph.node.append(helper.make_node("Mul", [name, name], [f"{square}s"]))
            probe.graph.node.append(helper.make_node("GlobalAveragePool", [f"{square}s"], [square]))
        else:
            probe.graph.node.append(helper.make_node("Identity", [name], [mean]))
            probe.graph.node.append(helper.make_node("Mul", [name, name], [square]))
        probe.graph.output.extend(
            helper.make_tensor_value_info(output, TensorProto.FLOAT, None) for output in (mean, square)
        )
    return probe
