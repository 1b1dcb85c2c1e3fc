"""What quantization does to each layer's output, with everything before it exact.

One graph has the float network and, beside each convolution, the same one with its input through Q/DQ at
every candidate threshold and with int8 weights. Of each is kept the squared error of the output, by which a
threshold is chosen, and the mean error of every channel, which bias correction takes away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from calib.placement import Point
from calib.quantize import along, quantize_weight, scale_of
from runtime.graph.model import open_session, tensor_types

__all__ = ["LayerError", "layer_errors"]

_PREFIX = "advprop_layer/"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """One layer at one threshold."""

    node: str
    """Name of the convolution or matrix product."""
    tensor: str
    """The activation it reads."""
    threshold: float
    """What 127 stands for."""
    noise: float
    """Squared error of its output over the squared output itself."""
    shift: NDArray[np.float64]
    """Mean error of each output channel, (channels,)."""


def layer_errors(
    model: onnx.ModelProto,
    points: Iterable[Point],
    candidates: Mapping[str, Iterable[float]],
    batches: Iterable[NDArray[Any]],
    progress: Callable[[int], None] | None = None,
) -> list[LayerError]:
    """Tries every candidate threshold of every quantized layer.

    Args:
        model: a float32 graph.
        points: from `points_of`; those that are `int8` are tried.
        candidates: tensor → thresholds; two that give the same scale count once.
        batches: inputs of the graph.
        progress: called after each batch with its number of images.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    trials = _add_trials(probe, [point for point in points if point.int8], candidates)
    session = open_session(probe)
    input_name = probe.graph.input[0].name
    names = (name for point, _, key in trials for name in (key + "/sq", key + "/mean", _power(point)))
    wanted = list(dict.fromkeys(names))
    sums: dict[str, Any] = {}
    count = 0
    for batch in batches:
        for name, value in zip(wanted, session.run(wanted, {input_name: batch}), strict=True):
            weight = len(batch) if name.endswith("/mean") else 1
            sums[name] = sums.get(name, 0.0) + weight * value.astype(np.float64)
        count += len(batch)
        if progress:
            progress(len(batch))
    return [
        LayerError(
            node=point.node,
            tensor=point.tensor,
            threshold=threshold,
            noise=float(sums[key + "/sq"]) / max(float(sums[_power(point)]), 1e-30),
            shift=sums[key + "/mean"] / count,
        )
        for point, threshold, key in trials
    ]


def _power(point: Point) -> str:
    return f"{_PREFIX}{point.node}/power"


def _add_trials(
    probe: onnx.ModelProto, points: list[Point], candidates: Mapping[str, Iterable[float]]
) -> list[tuple[Point, float, str]]:
    graph = probe.graph
    nodes = {node.name: node for node in graph.node}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    types = tensor_types(probe)
    scales: dict[str, dict[float, float]] = {}
    for point in points:
        if point.tensor not in scales:
            scales[point.tensor] = {float(scale_of(value)): value for value in candidates[point.tensor]}
            for number, scale in enumerate(scales[point.tensor]):
                _add_pair(graph, point.tensor, number, scale)
    trials = []
    for point in points:
        node = nodes[point.node]
        weight = _add_weight(graph, constants[point.weight], point.axis)
        channels = 1 if point.op in ("Conv", "ConvTranspose") else -1
        rank = len(types[node.output[0]].shape.dim)
        axes = [axis for axis in range(rank) if axis != channels % rank]
        axes_name = f"{_PREFIX}{point.node}/axes"
        graph.initializer.append(numpy_helper.from_array(np.asarray(axes, np.int64), axes_name))
        _add_output(graph, "ReduceSumSquare", [node.output[0]], _power(point))
        for number, (_, threshold) in enumerate(scales[point.tensor].items()):
            key = f"{_PREFIX}{point.node}/{number}"
            trial = graph.node.add()
            trial.CopyFrom(node)
            trial.name, trial.input[0], trial.input[1] = key, f"{_PREFIX}{point.tensor}/{number}/back", weight
            trial.output[0] = key + "/out"
            graph.node.append(helper.make_node("Sub", [key + "/out", node.output[0]], [key + "/error"]))
            _add_output(graph, "ReduceSumSquare", [key + "/error"], key + "/sq")
            _add_output(graph, "ReduceMean", [key + "/error", axes_name], key + "/mean")
            trials.append((point, threshold, key))
    return trials


def _add_output(graph: onnx.GraphProto, op: str, inputs: list[str], output: str) -> None:
    graph.node.append(helper.make_node(op, inputs, [output], keepdims=0))
    graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))


def _add_pair(graph: onnx.GraphProto, tensor: str, number: int, scale: float) -> None:
    name = f"{_PREFIX}{tensor}/{number}"
    graph.initializer.append(numpy_helper.from_array(np.asarray(scale, np.float32), name + "/scale"))
    graph.initializer.append(numpy_helper.from_array(np.zeros((), np.int8), name + "/zero"))
    ends = [name + "/scale", name + "/zero"]
    graph.node.append(helper.make_node("QuantizeLinear", [tensor, *ends], [name + "/whole"]))
    graph.node.append(helper.make_node("DequantizeLinear", [name + "/whole", *ends], [name + "/back"]))


def _add_weight(graph: onnx.GraphProto, weight: onnx.TensorProto, axis: int) -> str:
    """The weights as INT8 leaves them, in float32."""
    name = f"{_PREFIX}{weight.name}/rounded/{axis}"
    if not any(tensor.name == name for tensor in graph.initializer):
        array = numpy_helper.to_array(weight)
        integers, scales = quantize_weight(array, axis)
        graph.initializer.append(numpy_helper.from_array(integers * along(scales, axis, array.ndim), name))
    return name
