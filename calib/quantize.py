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
from runtime.graph.edit import Names, add_initializer, along, array_of, constant_of, make_node
from runtime.graph.model import check

__all__ = ["InsertQDQ", "dequantized_inputs", "quantize", "quantize_weight", "scale_of"]

_MIN_SCALE = float(np.finfo(np.float16).smallest_subnormal)
_MAX_SCALE = float(np.finfo(np.float16).max)


def scale_of(threshold: float | NDArray[np.floating]) -> NDArray[np.float32]:
    """Return threshold / 127, rounded up to an FP16 number and clipped to FP16's positive range."""
    exact = np.maximum(np.asarray(threshold, np.float64) / LEVELS, _MIN_SCALE)
    exact = np.minimum(exact, _MAX_SCALE)
    half = np.asarray(exact.astype(np.float16))
    np.nextafter(half, np.float16(np.inf), out=half, where=half.astype(np.float64) < exact)
    return half.astype(np.float32)


def dequantized_inputs(model: onnx.ModelProto, points: Iterable[Point]) -> dict[str, tuple[str, str]]:
    """Return the names of activation and weights behind DequantizeLinear, by quantized node."""
    nodes = {node.name: node for node in model.graph.node}
    return {point.node: (nodes[point.node].input[0], nodes[point.node].input[1]) for point in points if point.int8}


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
        names = Names(graph)
        activations: dict[ir.Value, ir.Value] = {}
        weights: dict[tuple[ir.Value, int], ir.Value] = {}
        for node in list(graph):
            for position, value in enumerate(node.inputs):
                if value is not None and (node.name, value.name) in self._residuals:
                    node.replace_input_with(position, self._dequantized(graph, node, value, activations, names))
            point = self._points.get(node.name or "")
            if point is None:
                continue
            data, weight = node.inputs[0], node.inputs[1]
            assert data is not None
            assert weight is not None
            node.replace_input_with(0, self._dequantized(graph, node, data, activations, names))
            key = (weight, point.axis)
            if key not in weights:
                weights[key] = _dequantized_weight(graph, node, key, self._weights.get(point.node), names)
            node.replace_input_with(1, weights[key])
            correction = self._biases.get(point.node)
            if correction is not None:
                _correct_bias(graph, node, correction, names)
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=bool(activations))

    def _dequantized(
        self, graph: ir.Graph, reader: ir.Node, value: ir.Value, done: dict[ir.Value, ir.Value], names: Names
    ) -> ir.Value:
        """Return the value behind a Q/DQ pair. All readers share it; `reader` is the first one."""
        if value not in done:
            name = str(value.name)
            scale = add_initializer(graph, names.tensor(f"{name}_scale"), scale_of(self._thresholds[name]))
            zero = add_initializer(graph, names.tensor(f"{name}_zero"), np.zeros((), np.int8))
            done[value] = _insert_pair(graph, reader, value, (scale, zero), names)
        return done[value]


def _insert_pair(
    graph: ir.Graph, reader: ir.Node, value: ir.Value, parameters: tuple[ir.Value, ir.Value], names: Names
) -> ir.Value:
    name = str(value.name)
    quantized = make_node(
        "QuantizeLinear",
        [value, *parameters],
        name=names.node(f"{name}_quantize"),
        output=names.tensor(f"{name}_int8"),
        like=value,
        dtype=ir.DataType.INT8,
    )
    dequantized = make_node(
        "DequantizeLinear",
        [quantized.outputs[0], *parameters],
        name=names.node(f"{name}_dequantize"),
        output=names.tensor(f"{name}_dequantized"),
        like=value,
    )
    graph.insert_before(reader, [quantized, dequantized])
    return dequantized.outputs[0]


def _dequantized_weight(
    graph: ir.Graph, reader: ir.Node, key: tuple[ir.Value, int], rounded: NDArray[np.int8] | None, names: Names
) -> ir.Value:
    weight, axis = key
    integers, scales = quantize_weight(array_of(weight), axis)
    if rounded is not None:
        integers = rounded
    name = f"{weight.name}_int8" if axis == 0 else f"{weight.name}_int8_{axis}"
    node = make_node(
        "DequantizeLinear",
        [
            add_initializer(graph, names.tensor(name), integers),
            add_initializer(graph, names.tensor(f"{name}_scale"), scales),
            add_initializer(graph, names.tensor(f"{name}_zero"), np.zeros(scales.shape, np.int8)),
        ],
        name=names.node(f"{name}_dequantize"),
        output=names.tensor(f"{name}_dequantized"),
        like=weight,
        attributes={"axis": axis},
    )
    graph.insert_before(reader, node)
    return node.outputs[0]


def _correct_bias(graph: ir.Graph, node: ir.Node, correction: NDArray[np.floating], names: Names) -> None:
    """Add `correction`, (channels,), to the output of a layer: in its bias if possible."""
    name = f"{node.name}_bias_corrected"
    if node.op_type == "MatMul":  # has no bias
        _add_behind(graph, node, correction, names)
        return
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    old = constant_of(bias)
    if bias is not None and old is None:  # it is computed
        _add_behind(graph, node, correction, names)
        return
    # Gemm multiplies its bias by beta. If beta is 0 or there is no bias, the correction is the bias.
    beta = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
    if old is None or beta == 0:
        old, beta = np.zeros(1, np.float32), 1.0
        node.attributes.pop("beta", None)
    value = add_initializer(graph, names.tensor(name), (old + correction / beta).astype(np.float32))
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, value)


def _add_behind(graph: ir.Graph, node: ir.Node, correction: NDArray[np.floating], names: Names) -> None:
    """Add `correction` with an Add node, or in the constant of the Add that follows."""
    output = node.outputs[0]
    readers = [(reader, position) for reader, position in output.uses()]
    value = np.asarray(correction, np.float32)
    name = names.tensor(f"{node.name}_bias_corrected")
    if len(readers) == 1 and readers[0][0].op_type == "Add" and not output.is_graph_output():
        reader, position = readers[0]
        old = constant_of(reader.inputs[1 - position])
        if old is not None and old.size == value.size == max(old.shape[-1:], default=0):
            reader.replace_input_with(1 - position, add_initializer(graph, name, (old + value).astype(np.float32)))
            return
    channels = 1 if node.op_type in ("Conv", "ConvTranspose") else len(output.shape or ()) - 1
    rank = len(output.shape) if output.shape is not None else 2
    shaped = along(value, channels, rank)
    total = make_node(
        "Add",
        [output, add_initializer(graph, name, shaped)],
        name=names.node(f"{node.name}_bias"),
        output=names.tensor(f"{output.name}_corrected"),
        like=output,
    )
    graph.insert_after(node, total)
    ir.convenience.replace_all_uses_with(output, total.outputs[0], replace_graph_outputs=True)
    total.replace_input_with(0, output)
