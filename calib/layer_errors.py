"""Measure the output error of each quantized layer, with everything before the layer exact.

One graph contains the float network and, next to each layer, copies of the layer with int8 weights
and with its input through Q/DQ at each candidate threshold. The squared error of the output is used
to choose thresholds. The mean error of each channel is used for bias correction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from calib.placement import Point
from calib.quantize import quantize_weight, scale_of
from runtime.graph.edit import along
from runtime.graph.model import open_session, tensor_types
from runtime.graph.structure import initializers_of, unused_prefix

__all__ = ["LayerError", "layer_errors", "output_channels"]

_PREFIX = "advprop_layer/"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """The error of one layer at one threshold."""

    node: str
    """Name of the convolution or matrix product."""
    tensor: str
    """Activation that it reads."""
    threshold: float
    """Clipping threshold (amax) of the activation."""
    noise: float
    """Sum of the squared error of its output, divided by the sum of the squared output."""
    shift: NDArray[np.float64]
    """Mean error of each output channel, (channels,)."""


class _Trial(NamedTuple):
    """One layer at one threshold, and the tensors that the probe graph outputs for it."""

    point: Point
    threshold: float
    power: str
    """Sum of the squared output of the exact layer."""
    squared_error: str
    """Sum of the squared error."""
    mean_error: str
    """Mean error of each channel over the batch."""


def layer_errors(
    model: onnx.ModelProto,
    points: Iterable[Point],
    candidates: Mapping[str, Iterable[float]],
    batches: Iterable[NDArray[Any]],
    progress: Callable[[int], None] | None = None,
) -> list[LayerError]:
    """Return the error of each quantized layer at each candidate threshold.

    Args:
        model: a float32 graph.
        points: from `points_of`; points with `int8` set are measured.
        candidates: tensor → thresholds; thresholds with the same scale are tried once.
        batches: inputs of the graph.
        progress: called after each batch with its number of images.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    trials = _add_trials(probe, [point for point in points if point.int8], candidates)
    session = open_session(probe)
    input_name = probe.graph.input[0].name
    means = {trial.mean_error for trial in trials}
    outputs = list(
        dict.fromkeys(name for trial in trials for name in (trial.squared_error, trial.mean_error, trial.power))
    )
    sums: dict[str, Any] = {}
    count = 0
    for batch in batches:
        for name, value in zip(outputs, session.run(outputs, {input_name: batch}), strict=True):
            weight = len(batch) if name in means else 1
            sums[name] = sums.get(name, 0.0) + weight * value.astype(np.float64)
        count += len(batch)
        if progress:
            progress(len(batch))
    return [
        LayerError(
            node=trial.point.node,
            tensor=trial.point.tensor,
            threshold=trial.threshold,
            noise=float(sums[trial.squared_error]) / max(float(sums[trial.power]), 1e-30),
            shift=sums[trial.mean_error] / count,
        )
        for trial in trials
    ]


def output_channels(op: str, rank: int) -> int:
    """Return the axis of a layer's output, of `rank` dimensions, that holds the channels."""
    return 1 if op in ("Conv", "ConvTranspose") else rank - 1


def _add_trials(probe: onnx.ModelProto, points: list[Point], candidates: Mapping[str, Iterable[float]]) -> list[_Trial]:
    graph = probe.graph
    prefix = unused_prefix(graph, _PREFIX)
    nodes = {node.name: node for node in graph.node}
    constants = initializers_of(graph)
    types = tensor_types(probe)
    scales: dict[str, dict[float, float]] = {}
    for point in points:
        if point.tensor not in scales:
            scales[point.tensor] = {float(scale_of(value)): value for value in candidates[point.tensor]}
            for number, scale in enumerate(scales[point.tensor]):
                _add_pair(graph, point.tensor, f"{prefix}{point.tensor}/{number}", scale)
    trials = []
    for point in points:
        node = nodes[point.node]
        weight = _add_dequantized_weight(graph, constants[point.weight], point.axis, prefix)
        rank = len(types[node.output[0]].shape.dim)
        axes = [axis for axis in range(rank) if axis != output_channels(point.op, rank)]
        layer = f"{prefix}{point.node}"
        graph.initializer.append(numpy_helper.from_array(np.asarray(axes, np.int64), f"{layer}/axes"))
        power = _add_output(graph, "ReduceSumSquare", [node.output[0]], f"{layer}/power")
        for number, threshold in enumerate(scales[point.tensor].values()):
            copy = graph.node.add()
            copy.CopyFrom(node)
            copy.name = f"{layer}/{number}"
            copy.input[0], copy.input[1] = f"{prefix}{point.tensor}/{number}/back", weight
            copy.output[0] = f"{copy.name}/out"
            error = f"{copy.name}/error"
            graph.node.append(helper.make_node("Sub", [copy.output[0], node.output[0]], [error]))
            squared = _add_output(graph, "ReduceSumSquare", [error], f"{copy.name}/sq")
            mean = _add_output(graph, "ReduceMean", [error, f"{layer}/axes"], f"{copy.name}/mean")
            trials.append(_Trial(point, threshold, power, squared, mean))
    return trials


def _add_output(graph: onnx.GraphProto, op: str, inputs: list[str], output: str) -> str:
    graph.node.append(helper.make_node(op, inputs, [output], keepdims=0))
    graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    return output


def _add_pair(graph: onnx.GraphProto, tensor: str, name: str, scale: float) -> None:
    graph.initializer.append(numpy_helper.from_array(np.asarray(scale, np.float32), name + "/scale"))
    graph.initializer.append(numpy_helper.from_array(np.zeros((), np.int8), name + "/zero"))
    parameters = [name + "/scale", name + "/zero"]
    graph.node.append(helper.make_node("QuantizeLinear", [tensor, *parameters], [name + "/int8"]))
    graph.node.append(helper.make_node("DequantizeLinear", [name + "/int8", *parameters], [name + "/back"]))


def _add_dequantized_weight(graph: onnx.GraphProto, weight: onnx.TensorProto, axis: int, prefix: str) -> str:
    """Add the weights as float32 with their INT8 rounding error, once per axis."""
    name = f"{prefix}{weight.name}/rounded/{axis}"
    if not any(tensor.name == name for tensor in graph.initializer):
        array = numpy_helper.to_array(weight)
        integers, scales = quantize_weight(array, axis)
        # In place, because protobuf cannot copy messages of 2 GB.
        rounded = graph.initializer.add(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
        rounded.raw_data = (integers * along(scales, axis, array.ndim)).astype("<f4").tobytes()
    return name
