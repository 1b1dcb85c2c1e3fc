"""Measure the largest magnitude of tensors over any number of images.

The maxima are computed inside the graph: a run returns a few numbers per tensor, and memory does
not grow with the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from runtime.errors import DataError
from runtime.graph.model import open_session, tensor_types
from runtime.graph.structure import graph_inputs, unused_prefix

__all__ = ["Collected", "collect", "collect_amax", "collect_channel_amax"]

_PREFIX = "advprop_range/"
_NO_IMAGES = "cannot measure ranges without images: no batch was given"


class Collected(NamedTuple):
    """The result of one pass over the images."""

    amax: dict[str, float]
    """Tensor name → max |x|."""
    output: NDArray[Any]
    """The graph's first output, (N, …)."""


def collect_amax(
    model: onnx.ModelProto,
    batches: Iterable[NDArray[Any]],
    progress: Callable[[int], None] | None = None,
    *,
    tensors: Collection[str] | None = None,
) -> dict[str, float]:
    """Return the largest magnitude of the input and of each float32 node output.

    Args:
        model: a float32 graph with one input.
        batches: inputs of the graph; no batch is kept after it has run.
        progress: called after each batch with its number of images.
        tensors: measure only these, which is faster; unknown names are ignored.

    Returns:
        Tensor name → max |x| over all batches. It is inf from 1.8e19 on, where the square
        overflows. A single nan can go unnoticed, because ONNX Runtime's maximum may skip it.

    Raises:
        DataError: there is no batch.
    """
    return collect(model, batches, progress, tensors=tensors).amax


def collect(
    model: onnx.ModelProto,
    batches: Iterable[NDArray[Any]],
    progress: Callable[[int], None] | None = None,
    *,
    tensors: Collection[str] | None = None,
) -> Collected:
    """Return the result of `collect_amax` and the graph's first output, from a single pass.

    Raises:
        DataError: there is no batch.
    """
    ranks = {name: rank for name, rank in _float_tensors(model).items() if tensors is None or name in tensors}
    prefix = unused_prefix(model.graph, _PREFIX)
    session = open_session(_with_maxima(model, ranks, prefix))
    input_name = session.get_inputs()[0].name
    squares = np.zeros(len(ranks))
    outputs = []
    names = [model.graph.output[0].name, *(prefix + name for name in ranks)]
    for batch in batches:
        output, *maxima = session.run(names, {input_name: batch})
        squares = np.maximum(squares, [float(value.max()) for value in maxima])  # propagates nan
        outputs.append(output)
        if progress:
            progress(len(batch))
    if not outputs:
        raise DataError(_NO_IMAGES)
    # The square root of a rounded square is exact in binary floating point, unless the square
    # overflowed.
    amax = np.sqrt(squares.astype(np.float32))
    return Collected(dict(zip(ranks, amax.tolist(), strict=True)), np.concatenate(outputs))


def collect_channel_amax(
    model: onnx.ModelProto,
    batches: Iterable[NDArray[Any]],
    tensors: Collection[str],
    progress: Callable[[int], None] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Return the largest magnitude of each channel, the second dimension, of float32 tensors.

    Returns:
        Tensor name → max |x|, (channels,).

    Raises:
        DataError: there is no batch.
    """
    ranks = {name: rank for name, rank in _float_tensors(model).items() if name in tensors}
    prefix = unused_prefix(model.graph, _PREFIX)
    session = open_session(_with_maxima(model, ranks, prefix, channels=True))
    input_name = session.get_inputs()[0].name
    squares: dict[str, NDArray[np.float32]] = {}
    for batch in batches:
        found = session.run([prefix + name for name in ranks], {input_name: batch})
        for name, value in zip(ranks, found, strict=True):
            largest = value.reshape(*value.shape[:2], -1).max((0, 2))
            squares[name] = np.maximum(squares.get(name, np.float32(0)), largest)
        if progress:
            progress(len(batch))
    if ranks and not squares:
        raise DataError(_NO_IMAGES)
    return {name: np.sqrt(value) for name, value in squares.items()}


def _float_tensors(model: onnx.ModelProto) -> dict[str, int]:
    """Return the float32 inputs and node outputs, and their number of dimensions."""
    types = tensor_types(model)
    inputs = [value.name for value in graph_inputs(model.graph)]
    outputs = [name for node in model.graph.node for name in node.output if name]
    return {
        name: len(types[name].shape.dim)
        for name in (*inputs, *outputs)
        if name in types and types[name].elem_type == TensorProto.FLOAT
    }


def _with_maxima(
    model: onnx.ModelProto, ranks: dict[str, int], prefix: str, *, channels: bool = False
) -> onnx.ModelProto:
    """Return a copy of the graph that also outputs the largest square of each tensor.

    For an (N, C, H, W) tensor it outputs the largest square of each (H, W). With `channels`, it
    outputs all squares of other tensors.

    It uses Mul and GlobalMaxPool because ONNX Runtime implements both for the blocked layout of its
    convolutions. Abs and ReduceMax would cost two changes of layout per tensor.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[1:]
    for name, rank in ranks.items():
        output = prefix + name
        probe.graph.node.append(helper.make_node("Mul", [name, name], [output + "/square"]))
        if rank == 4:
            probe.graph.node.append(helper.make_node("GlobalMaxPool", [output + "/square"], [output]))
        elif channels:
            probe.graph.node.append(helper.make_node("Identity", [output + "/square"], [output]))
        else:
            probe.graph.node.append(helper.make_node("ReduceMax", [output + "/square"], [output], keepdims=0))
        probe.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    return probe
