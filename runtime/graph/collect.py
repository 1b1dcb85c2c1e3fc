"""Streaming ranges: the largest magnitude of tensors over any number of images.

The maxima are taken inside the graph, so a run returns a few numbers a tensor and memory
does not grow with the number of images.
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

__all__ = ["Collected", "collect", "collect_amax", "collect_channel_amax"]

_PREFIX = "advprop_range/"


class Collected(NamedTuple):
    """What one pass over the images gives."""

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
    """Measures the largest magnitude of the input and of every float32 node output.

    Args:
        model: a float32 graph with one input.
        batches: inputs of the graph; each is dropped once it has run.
        progress: called after each batch with its number of images.
        tensors: measure only these, which is quicker; others of that name are passed over.

    Returns:
        Tensor name → max |x| over all batches; inf from 1.8e19 on, where the square overflows. A single
        nan may be passed over, as ONNX Runtime's maximum does.

    Raises:
        DataError: the batches are empty.
    """
    return collect(model, batches, progress, tensors=tensors).amax


def collect(
    model: onnx.ModelProto,
    batches: Iterable[NDArray[Any]],
    progress: Callable[[int], None] | None = None,
    *,
    tensors: Collection[str] | None = None,
) -> Collected:
    """Does what `collect_amax` does, and keeps the graph's first output, in the same pass."""
    ranks = {name: rank for name, rank in _float_tensors(model).items() if tensors is None or name in tensors}
    session = open_session(_with_maxima(model, ranks))
    input_name = session.get_inputs()[0].name
    squares = np.zeros(len(ranks))
    outputs = []
    wanted = [model.graph.output[0].name, *(_PREFIX + name for name in ranks)]
    for batch in batches:
        output, *maxima = session.run(wanted, {input_name: batch})
        squares = np.maximum(squares, [float(value.max()) for value in maxima])  # keeps nan
        outputs.append(output)
        if progress:
            progress(len(batch))
    if not outputs:
        raise DataError("ranges can only be measured on images, and none were given")
    # In binary floating point the root of a rounded square is the very number, unless the square overflowed.
    amax = np.sqrt(squares.astype(np.float32))
    return Collected(dict(zip(ranks, amax.tolist(), strict=True)), np.concatenate(outputs))


def collect_channel_amax(
    model: onnx.ModelProto,
    batches: Iterable[NDArray[Any]],
    tensors: Collection[str],
    progress: Callable[[int], None] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Measures the largest magnitude of each channel, the second dimension, of float32 tensors.

    Returns:
        Tensor name → max |x|, (channels,).

    Raises:
        DataError: the batches are empty.
    """
    ranks = {name: rank for name, rank in _float_tensors(model).items() if name in tensors}
    session = open_session(_with_maxima(model, ranks, channels=True))
    input_name = session.get_inputs()[0].name
    squares: dict[str, NDArray[np.float32]] = {}
    for batch in batches:
        found = session.run([_PREFIX + name for name in ranks], {input_name: batch})
        for name, value in zip(ranks, found, strict=True):
            largest = value.reshape(*value.shape[:2], -1).max((0, 2))
            squares[name] = np.maximum(squares.get(name, np.float32(0)), largest)
        if progress:
            progress(len(batch))
    if ranks and not squares:
        raise DataError("ranges can only be measured on images, and none were given")
    return {name: np.sqrt(value) for name, value in squares.items()}


def _float_tensors(model: onnx.ModelProto) -> dict[str, int]:
    """Names of the float32 tensors that images flow through, and their ranks."""
    values = tensor_types(model)
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = [value.name for value in model.graph.input if value.name not in initializers]
    outputs = [name for node in model.graph.node for name in node.output if name]
    return {
        name: len(values[name].shape.dim)
        for name in (*inputs, *outputs)
        if name in values and values[name].elem_type == TensorProto.FLOAT
    }


def _with_maxima(model: onnx.ModelProto, ranks: dict[str, int], channels: bool = False) -> onnx.ModelProto:
    """A copy of the graph that also gives the largest square of each tensor; of (N, C, H, W), that of each (H, W).
    With `channels`, the squares of other tensors stay as they are.

    Mul and GlobalMaxPool, since ONNX Runtime has them for the blocked layout its convolutions like: an
    operator that has it not, Abs or ReduceMax, costs two changes of layout a tensor.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[1:]
    for name, rank in ranks.items():
        output = _PREFIX + name
        probe.graph.node.append(helper.make_node("Mul", [name, name], [output + "/square"]))
        if rank == 4:
            probe.graph.node.append(helper.make_node("GlobalMaxPool", [output + "/square"], [output]))
        elif channels:
            probe.graph.node.append(helper.make_node("Identity", [output + "/square"], [output]))
        else:
            probe.graph.node.append(helper.make_node("ReduceMax", [output + "/square"], [output], keepdims=0))
        probe.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    return probe
