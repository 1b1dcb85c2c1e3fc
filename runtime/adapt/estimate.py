"""Re-estimate the statistics of all normalized tensors, each behind adapted earlier ones.

Shape suffixes: N images, C channels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from runtime.adapt.moments import affine_of, moments_of
from runtime.adapt.sessions import Affine, SegmentedGraph
from runtime.errors import DataError
from runtime.graph.affine import rescale
from runtime.graph.model import check
from runtime.graph.norms import NORMS_KEY, Moments, Norm, norms_to_json
from runtime.graph.structure import set_metadata

__all__ = ["Estimate", "Layer", "Weighting", "estimate", "with_affines"]

_MEMORY_BYTES = 2**30
"""Memory for tensors between two segments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One normalized tensor on the field images."""

    tensor: str
    """Its name."""
    distance: float
    """Distance of its moments from those on clean images, see `Norm.distance`. If those were not
    measured, the distance from the moments of the training images."""
    noise: float
    """Distance that so few images cause on average if nothing is shifted."""
    weight: float
    """Weight of the field images in its new statistics, 0 to 1."""

    @property
    def evidence(self) -> float:
        """Share of the distance that noise does not explain, 0 to 1."""
        return max(0.0, 1.0 - self.noise / self.distance) if self.distance > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """New statistics for a model."""

    affines: dict[str, Affine]
    """Factor and shift of each normalized tensor that apply them."""
    layers: tuple[Layer, ...]
    """The tensors, in the order of computation."""
    outputs_NK: NDArray[np.float32]
    """Outputs of the adapted model for the field images."""


Weighting = Callable[[Layer], float]
"""Returns the weight of the field images for a layer, whose own `weight` is not set yet."""


def estimate(
    model: onnx.ModelProto,
    norms: Mapping[str, Norm],
    inputs: Sequence[NDArray[Any]] | NDArray[Any],
    weighting: Weighting,
    *,
    size: tuple[int, int],
    threads: int = 0,
    memory_bytes: int = _MEMORY_BYTES,
) -> Estimate:
    """Estimate the statistics of each normalized tensor behind the adapted earlier ones.

    All images pass one segment of the graph before the next, which is exact and costs about two
    runs. If their tensors need more than `memory_bytes`, the images are divided into equal groups,
    and the moments of the groups are averaged. Then a tensor is measured behind tensors that were
    normalized with the statistics of its group.

    Args:
        model: a float32 graph with one input and one output.
        norms: its norms, by tensor.
        inputs: the model's input for all field images.
        weighting: chooses the weight of the field images.
        size: height and width of the images.
        threads: CPU threads; 0 uses all cores.
        memory_bytes: memory for tensors between two segments.

    Raises:
        DataError: there are no images.
    """
    if not len(inputs):
        raise DataError("cannot estimate statistics without images")
    graph = SegmentedGraph(model, norms.keys(), size, threads)
    most = max(graph.batch_size, memory_bytes // max(1, graph.bytes_per_image))
    groups = np.array_split(np.arange(len(inputs)), math.ceil(len(inputs) / most))
    runs = [_measure(graph, norms, inputs[group[0] : group[-1] + 1], weighting, len(inputs)) for group in groups]
    if len(runs) == 1:
        moments, outputs_NK = runs[0]
    else:
        moments = {name: _averaged([run[0][name] for run in runs], [len(group) for group in groups]) for name in norms}
        outputs_NK = np.concatenate([run[1] for run in runs])
    layers = {name: _layer(name, norms[name], moments[name], weighting) for name in moments}
    affines = {name: affine_of(norms[name], moments[name], layer.weight) for name, layer in layers.items()}
    return Estimate(affines=affines, layers=tuple(layers.values()), outputs_NK=outputs_NK)


def with_affines(model: onnx.ModelProto, norms: Mapping[str, Norm], affines: Mapping[str, Affine]) -> onnx.ModelProto:
    """Return a copy of the model with rescaled tensors: the same nodes, with other constants."""
    graph_model = ir.from_proto(model)
    values = {value.name: value for node in graph_model.graph for value in node.outputs}
    changed = dict(norms)
    for name, (scale_C, shift_C) in affines.items():
        rescale(graph_model.graph, values[name], scale_C, shift_C)
        # β and |γ| stay. ε in units of the rescaled tensor has the factor scale².
        changed[name] = replace(norms[name], epsilon_C=norms[name].epsilon_C * scale_C**2)
    adapted = ir.to_proto(graph_model)
    set_metadata(adapted, {NORMS_KEY: norms_to_json(changed)})
    check(adapted)
    return adapted


def _measure(
    graph: SegmentedGraph, norms: Mapping[str, Norm], inputs: Any, weighting: Weighting, total: int
) -> tuple[dict[str, Moments], NDArray[np.float32]]:
    """Return the moments and outputs of a group of images, out of `total` images."""
    starts = range(0, len(inputs), graph.batch_size)
    batches = [{graph.input: inputs[start : start + graph.batch_size]} for start in starts]
    sizes = [len(tensors[graph.input]) for tensors in batches]
    found: dict[str, Moments] = {}
    affines: dict[str, Affine] = {}
    for segment in graph.segments:
        session = graph.open(segment, affines)
        parts = [session.run(tensors, images) for tensors, images in zip(batches, sizes, strict=True)]
        if segment.end:
            norm = norms[segment.end]
            means, squares = zip(*(part for part in parts if part is not None), strict=True)
            moments = moments_of(norm, np.concatenate(means), np.concatenate(squares))
            found[segment.end] = moments
            as_all = replace(moments, noise=moments.noise * len(inputs) / total)
            affines[segment.end] = affine_of(norm, moments, _layer(segment.end, norm, as_all, weighting).weight)
    return found, np.concatenate([tensors[graph.output] for tensors in batches])


def _layer(name: str, norm: Norm, field: Moments, weighting: Weighting) -> Layer:
    origin = norm.clean or Moments(mean_C=norm.mean_C, variance_C=norm.variance, noise=0.0)
    distance = norm.distance((field.mean_C - origin.mean_C) ** 2, (field.variance_C - origin.variance_C) ** 2)
    layer = Layer(tensor=name, distance=distance, noise=field.noise + origin.noise, weight=0.0)
    return replace(layer, weight=weighting(layer))


def _averaged(groups: Sequence[Moments], images: Sequence[int]) -> Moments:
    """Return the moments of all images from those of groups."""
    shares = np.asarray(images) / sum(images)
    mean_C = sum(share * group.mean_C for share, group in zip(shares, groups, strict=True))
    within_C = sum(share * group.variance_C for share, group in zip(shares, groups, strict=True))
    between_C = sum(share * (group.mean_C - mean_C) ** 2 for share, group in zip(shares, groups, strict=True))
    noise = float(sum(share**2 * group.noise for share, group in zip(shares, groups, strict=True)))
    return Moments(mean_C=np.asarray(mean_C), variance_C=np.asarray(within_C + between_C), noise=noise)
