"""Insert QuantizeLinear and DequantizeLinear (Q/DQ) nodes into a float32 graph.

INT8 is symmetric: values in [−127, 127], zero point 0. Scales are rounded up to FP16 numbers. The
quantization steps therefore stay the same when the rest of the graph is converted to FP16, where
TensorRT requires FP16 scales.
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
from runtime.graph.edit import add_initializer, along, array_of, constant_of, make_node
from runtime.graph.model import check

__all__ = ["InsertQDQ", "dequantized_names", "quantize", "quantize_weight", "scale_of"]

_MIN_SCALE = float(np.finfo(np.float16).smallest_subnormal)
_MAX_SCALE = float(np.finfo(np.float16).max)


def scale_of(threshold: float | NDArray[np.floating]) -> NDArray[np.float32]:
    """Return threshold / 127, rounded up to an FP16 number and clipped to FP16's positive range."""
    exact = np.maximum(np.asarray(threshold, np.float64) / LEVELS, _MIN_SCALE)
    exact = np.minimum(exact, _MAX_SCALE)
    half = np.asarray(exact.astype(np.float16))
    np.nextafter(half, np.float16(np.inf), out=half, where=half.astype(np.float64) < exact)
    return half.astype(np.float32)


def dequantized_names(point: Point) -> tuple[str, str]:
    """Return the names of a quantized layer's activation and weights after DequantizeLinear."""
    return _dequantized_name(point.tensor), _dequantized_name(_int8_name(point.weight, point.axis))


def _dequantized_name(name: str) -> str:
    return f"{name}_dequantized"


def _int8_name(weight: str, axis: int) -> str:
    return f"{weight}_int8" if axis == 0 else f"{weight}_int8_{axis}"


def quantize_weight(weight: NDArray[np.floating], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return int8 weights and the scale of each output channel, (channels,)."""
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
    """Return a float32 graph with Q/DQ nodes around the layers of `points` that are `int8`.

    Args:
        model: the float32 graph; not changed.
        points: from `points_of`.
        thresholds: tensor → clipping threshold (amax), for each activation that is quantized.
        biases: node → correction that is added to its bias, (channels,).
        weights: node → int8 weights to use instead of rounding to nearest; only for nodes whose
            weights no other node shares.
        residuals: (Add node, tensor) pairs; the tensor is quantized for that Add.
    """
    graph_model = ir.from_proto(model)
    InsertQDQ(points, thresholds, biases or {}, weights or {}, residuals)(graph_model)
    quantized = ir.to_proto(graph_model)
    check(quantized)
    return quantized


class InsertQDQ(ir.passes.InPlacePass):
    """Inserts Q/DQ pairs at activations, and DequantizeLinear nodes behind int8 weights."""

    def __init__(
        self,
        points: Iterable[Point],
        thresholds: Mapping[str, float],
        biases: Mapping[str, NDArray[np.floating]],
        weights: Mapping[str, NDArray[np.int8]],
        residuals: Iterable[tuple[str, str]],
    ) -> None:
        """See `quantize` for the arguments."""
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
                    node.replace_input_with(position, self._dequantized(graph, node, value, activations))
            point = self._points.get(node.name or "")
            if point is None:
                continue
            data, weight = node.inputs[0], node.inputs[1]
            assert data is not None
            assert weight is not None
            node.replace_input_with(0, self._dequantized(graph, node, data, activations))
            key = (weight, point.axis)
            if key not in weights:
                weights[key] = _dequantized_weight(graph, node, weight, point.axis, self._weights.get(point.node))
            node.replace_input_with(1, weights[key])
            self._correct_bias(graph, node)
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=bool(activations))

    def _dequantized(
        self, graph: ir.Graph, reader: ir.Node, value: ir.Value, done: dict[ir.Value, ir.Value]
    ) -> ir.Value:
        """Return the value behind a Q/DQ pair. All readers share it; `reader` is the first one."""
        if value not in done:
            name = str(value.name)
            scale = add_initializer(graph, f"{name}_scale", scale_of(self._thresholds[name]))
            zero = add_initializer(graph, f"{name}_zero", np.zeros((), np.int8))
            done[value] = _insert_pair(graph, reader, value, scale, zero)
        return done[value]

    def _correct_bias(self, graph: ir.Graph, node: ir.Node) -> None:
        correction = self._biases.get(node.name or "")
        if correction is None or node.op_type == "MatMul":  # MatMul has no bias
            return
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        array = constant_of(bias)
        if bias is not None and array is None:
            return
        old = np.float32(0) if array is None else array
        value = add_initializer(graph, f"{node.name}_bias_corrected", (old + correction).astype(np.float32))
        if bias is None:
            node.resize_inputs(3)
        node.replace_input_with(2, value)


def _insert_pair(graph: ir.Graph, reader: ir.Node, value: ir.Value, scale: ir.Value, zero: ir.Value) -> ir.Value:
    name = str(value.name)
    quantized = make_node(
        "QuantizeLinear",
        [value, scale, zero],
        name=f"{name}_quantize",
        output=f"{name}_int8",
        like=value,
        dtype=ir.DataType.INT8,
    )
    dequantized = make_node(
        "DequantizeLinear",
        [quantized.outputs[0], scale, zero],
        name=f"{name}_dequantize",
        output=_dequantized_name(name),
        like=value,
    )
    graph.insert_before(reader, [quantized, dequantized])
    return dequantized.outputs[0]


def _dequantized_weight(
    graph: ir.Graph, reader: ir.Node, weight: ir.Value, axis: int, rounded: NDArray[np.int8] | None
) -> ir.Value:
    integers, scales = quantize_weight(array_of(weight), axis)
    if rounded is not None:
        integers = rounded
    name = _int8_name(str(weight.name), axis)
    node = make_node(
        "DequantizeLinear",
        [
            add_initializer(graph, name, integers),
            add_initializer(graph, f"{name}_scale", scales),
            add_initializer(graph, f"{name}_zero", np.zeros(scales.shape, np.int8)),
        ],
        name=f"{name}_dequantize",
        output=_dequantized_name(name),
        like=weight,
        attributes={"axis": axis},
    )
    graph.insert_before(reader, node)
    return node.outputs[0]
