"""Float32 graph → the same with QuantizeLinear and DequantizeLinear where INT8 is wanted.

Symmetric int8 in [−127, 127], zero point 0. Scales are FP16 numbers, rounded up, so that the very same
steps hold when the rest of the graph becomes FP16, where TensorRT wants scales of that type.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from calib.placement import Point
from calib.thresholds import LEVELS
from runtime.graph.edit import add_initializer
from runtime.graph.model import check

__all__ = ["InsertQDQ", "along", "dequantized_names", "quantize", "quantize_weight", "scale_of"]

_SMALLEST = float(np.finfo(np.float16).smallest_subnormal)


def scale_of(threshold: float | NDArray[np.floating]) -> NDArray[np.float32]:
    """Returns threshold / 127, rounded up to a number that FP16 has: at least its smallest, at most its largest."""
    exact = np.maximum(np.asarray(threshold, np.float64) / LEVELS, _SMALLEST)
    exact = np.minimum(exact, float(np.finfo(np.float16).max))
    half = np.asarray(exact.astype(np.float16))
    np.nextafter(half, np.float16(np.inf), out=half, where=half.astype(np.float64) < exact)
    return half.astype(np.float32)


def dequantized_names(point: Point) -> tuple[str, str]:
    """Returns what the activation and the weights of a quantized layer are called behind their DequantizeLinear."""
    return _dequantized(point.tensor), _dequantized(_int8_name(point.weight, point.axis))


def _dequantized(name: str) -> str:
    return f"{name}_dequantized"


def _int8_name(weight: str, axis: int) -> str:
    return f"{weight}_int8" if axis == 0 else f"{weight}_int8_{axis}"


def along(scales: NDArray[np.float32], axis: int, rank: int) -> NDArray[np.float32]:
    """Reshapes one scale a channel so that it multiplies that axis of a tensor of `rank` dimensions."""
    return scales.reshape([-1 if dimension == axis else 1 for dimension in range(rank)])


def quantize_weight(weight: NDArray[np.floating], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Returns int8 weights and the scale of each output channel, (channels,)."""
    others = tuple(dimension for dimension in range(weight.ndim) if dimension != axis)
    scales = scale_of(np.abs(weight).max(axis=others))
    steps = np.round(weight.astype(np.float64) / along(scales, axis, weight.ndim))
    return np.clip(steps, -LEVELS, LEVELS).astype(np.int8), scales


def quantize(
    model: onnx.ModelProto,
    points: Iterable[Point],
    thresholds: Mapping[str, float],
    *,
    biases: Mapping[str, NDArray[np.floating]] | None = None,
    weights: Mapping[str, NDArray[np.int8]] | None = None,
    residuals: Iterable[tuple[str, str]] = (),
) -> onnx.ModelProto:
    """Quantizes the `int8` ones of `points`.

    Args:
        model: the float32 graph; not changed.
        points: from `points_of`.
        thresholds: of each tensor that they read: what 127 stands for.
        biases: what is added to a node's bias, (channels,), by its name: bias correction.
        weights: int8 weights that are not rounded to the nearest, by the node's name; of nodes that share theirs
            with no other.
        residuals: (Add, tensor) whose tensor is quantized for that Add.

    Returns:
        A float32 graph with Q/DQ nodes.
    """
    graph_model = ir.from_proto(model)
    InsertQDQ(points, thresholds, biases or {}, weights or {}, residuals)(graph_model)
    quantized = ir.to_proto(graph_model)
    check(quantized)
    return quantized


class InsertQDQ(ir.passes.InPlacePass):
    """Puts Q/DQ pairs before activations and replaces weights by int8 ones behind a DequantizeLinear."""

    def __init__(
        self,
        points: Iterable[Point],
        thresholds: Mapping[str, float],
        biases: Mapping[str, NDArray[np.floating]],
        weights: Mapping[str, NDArray[np.int8]],
        residuals: Iterable[tuple[str, str]],
    ) -> None:
        """As `quantize`."""
        super().__init__()
        self._points = {point.node: point for point in points if point.int8}
        self._thresholds = thresholds
        self._biases = biases
        self._weights = weights
        self._residuals = set(residuals)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        activations: dict[ir.Value, ir.Value] = {}
        weights: dict[tuple[ir.Value, int], ir.Value] = {}
        for node in list(graph):
            for position, value in enumerate(node.inputs):
                if value is not None and (node.name, value.name) in self._residuals:
                    node.replace_input_with(position, self._activation(graph, node, value, activations))
            point = self._points.get(node.name or "")
            if point is None:
                continue
            data, weight = node.inputs[0], node.inputs[1]
            assert data is not None
            assert weight is not None
            node.replace_input_with(0, self._activation(graph, node, data, activations))
            key = (weight, point.axis)
            if key not in weights:
                weights[key] = _weight(graph, node, weight, point.axis, self._weights.get(point.node))
            node.replace_input_with(1, weights[key])
            self._correct_bias(graph, node)
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=bool(activations))

    def _activation(
        self, graph: ir.Graph, reader: ir.Node, value: ir.Value, done: dict[ir.Value, ir.Value]
    ) -> ir.Value:
        """The value through Q and DQ, once for all its readers, `reader` being the first."""
        if value not in done:
            name = str(value.name)
            scale = add_initializer(graph, f"{name}_scale", scale_of(self._thresholds[name]))
            zero = add_initializer(graph, f"{name}_zero", np.zeros((), np.int8))
            done[value] = _pair(graph, reader, value, scale, zero)
        return done[value]

    def _correct_bias(self, graph: ir.Graph, node: ir.Node) -> None:
        change = self._biases.get(node.name or "")
        if change is None or node.op_type == "MatMul":  # which has no bias
            return
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and bias.const_value is None:
            return
        old = bias.const_value.numpy() if bias is not None and bias.const_value is not None else np.float32(0)
        value = add_initializer(graph, f"{node.name}_bias_corrected", (old + change).astype(np.float32))
        if bias is None:
            node.resize_inputs(3)
        node.replace_input_with(2, value)


def _pair(graph: ir.Graph, reader: ir.Node, value: ir.Value, scale: ir.Value, zero: ir.Value) -> ir.Value:
    quantized = ir.node("QuantizeLinear", [value, scale, zero], name=f"{value.name}_quantize")
    whole = quantized.outputs[0]
    whole.name, whole.type, whole.shape = f"{value.name}_int8", ir.TensorType(ir.DataType.INT8), value.shape
    back = ir.node("DequantizeLinear", [whole, scale, zero], name=f"{value.name}_dequantize")
    output = back.outputs[0]
    output.name, output.type, output.shape = _dequantized(str(value.name)), value.type, value.shape
    graph.insert_before(reader, [quantized, back])
    return output


def _weight(
    graph: ir.Graph, reader: ir.Node, weight: ir.Value, axis: int, rounded: NDArray[np.int8] | None
) -> ir.Value:
    assert weight.const_value is not None
    integers, scales = quantize_weight(weight.const_value.numpy(), axis)
    if rounded is not None:
        integers = rounded
    name = _int8_name(str(weight.name), axis)
    back = ir.node(
        "DequantizeLinear",
        [
            add_initializer(graph, name, integers),
            add_initializer(graph, f"{name}_scale", scales),
            add_initializer(graph, f"{name}_zero", np.zeros(scales.shape, np.int8)),
        ],
        {"axis": axis},
        name=f"{name}_dequantize",
    )
    output = back.outputs[0]
    output.name, output.type, output.shape = _dequantized(name), weight.type, weight.shape
    graph.insert_before(reader, back)
    return output
