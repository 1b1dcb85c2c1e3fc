"""Streaming ranges: the largest magnitude of every tensor over any number of images.

The maxima are taken inside the graph, so a run returns one number a tensor and memory
does not grow with the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from runtime.errors import DataError

__all__ = ["Collected", "collect", "collect_amax"]

_PREFIX = "advprop_amax/"


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
) -> dict[str, float]:
    """Measures the largest magnitude of the input and of every float32 node output.

    Args:
        model: a float32 graph with one input.
        batches: inputs of the graph; each is dropped once it has run.
        progress: called after each batch with its number of images.

    Returns:
        Tensor name → max |x| over all batches; inf or nan where a tensor had one.

    Raises:
        DataError: the batches are empty.
    """
    return collect(model, batches, progress).amax


def collect(
    model: onnx.ModelProto,
    batches: Iterable[NDArray[Any]],
    progress: Callable[[int], None] | None = None,
) -> Collected:
    """Does what `collect_amax` does, and keeps the graph's first output, in the same pass."""
    import onnxruntime as ort

    names = _float_tensors(model)
    session = ort.InferenceSession(_with_maxima(model, names), providers=["CPUExecutionProvider"])
    input_name = session.get_inputs()[0].name
    amax = np.zeros(len(names))
    outputs = []
    wanted = [model.graph.output[0].name, *(_PREFIX + name for name in names)]
    for batch in batches:
        output, *values = session.run(wanted, {input_name: batch})
        amax = np.maximum(amax, np.asarray(values, np.float64))  # keeps nan
        outputs.append(output)
        if progress:
            progress(len(batch))
    if not outputs:
        raise DataError("ranges can only be measured on images, and none were given")
    return Collected(dict(zip(names, amax.tolist(), strict=True)), np.concatenate(outputs))


def _float_tensors(model: onnx.ModelProto) -> list[str]:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = [value.name for value in model.graph.input if value.name not in initializers]
    outputs = [name for node in model.graph.node for name in node.output if name]
    return [name for name in (*inputs, *outputs) if types.get(name) == TensorProto.FLOAT]


def _with_maxima(model: onnx.ModelProto, names: list[str]) -> bytes:
    """A copy of the graph whose outputs are ReduceMax(Abs(x)) of each tensor."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[1:]
    for name in names:
        output = _PREFIX + name
        probe.graph.node.append(helper.make_node("Abs", [name], [output + "/abs"]))
        probe.graph.node.append(helper.make_node("ReduceMax", [output + "/abs"], [output], keepdims=0))
        probe.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, []))
    content: bytes = probe.SerializeToString()
    return content
