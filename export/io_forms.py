"""What goes in and out of the exported graph: pixels or FP16 instead of normalized float32,
probabilities or the most probable classes instead of logits.

Passes over a graph of float32 NCHW `input` and float32 `logits`; computed in float32
whatever the precision of the network between.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir

from runtime.graph.edit import add_initializer
from runtime.graph.model import check
from runtime.spec import METADATA_KEY, ModelSpec, Preprocessing

__all__ = ["TOP", "HalfInput", "HalfOutput", "PixelInput", "ProbabilityOutput", "TopKOutput", "with_forms"]

TOP = 5
"""Classes that a `topk` file gives, or all where it has fewer."""

_PREFIX = "advprop/"
"""Names of the nodes made here begin with it."""


def with_forms(model: onnx.ModelProto, spec: ModelSpec, *, half_output: bool = False) -> onnx.ModelProto:
    """Returns a graph that takes `spec.input_form` and gives `spec.output_form`.

    Args:
        model: a graph of float32 NCHW input and float32 logits, of any precision between;
            not changed.
        spec: goes into the result's metadata.
        half_output: give FP16 instead of float32.
    """
    if (spec.input_form, spec.output_form, half_output) == ("float32 NCHW", "logits", False):
        described = onnx.ModelProto()
        described.CopyFrom(model)
        onnx.helper.set_model_props(described, {METADATA_KEY: spec.to_json()})
        return described
    graph_model = ir.from_proto(model)
    kind, layout = spec.input_form.split()
    if kind == "uint8":
        PixelInput(spec.preprocessing, layout)(graph_model)
    if kind == "float16":
        HalfInput()(graph_model)
    if spec.output_form != "logits":
        ProbabilityOutput()(graph_model)
    if spec.output_form == "topk":
        TopKOutput(min(TOP, len(spec.classes)))(graph_model)
    if half_output:
        HalfOutput()(graph_model)
    graph_model.metadata_props[METADATA_KEY] = spec.to_json()
    proto = ir.to_proto(graph_model)
    check(proto)
    return proto


class PixelInput(ir.passes.InPlacePass):
    """Makes the graph take uint8 RGB pixels at the network's size and normalize them itself."""

    def __init__(self, spec: Preprocessing, layout: str) -> None:
        """`layout`: NCHW or NHWC."""
        super().__init__()
        self._spec, self._layout = spec, layout

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        image = graph.inputs[0]
        assert image.shape is not None
        batch, _, height, width = image.shape
        nhwc = self._layout == "NHWC"
        given = ir.Shape([batch, height, width, 3] if nhwc else [batch, 3, height, width])
        pixels = ir.Value(name=image.name, shape=given, type=ir.TensorType(ir.DataType.UINT8))
        wide = ir.Shape([batch, 3, height, width])
        nodes: list[ir.Node] = []
        # Cast first: TensorRT knows uint8 at the edge of a network only.
        value = _append(nodes, "Cast", [pixels], given, ir.DataType.FLOAT, {"to": int(ir.DataType.FLOAT)})
        if nhwc:
            value = _append(nodes, "Transpose", [value], wide, ir.DataType.FLOAT, {"perm": [0, 3, 1, 2]})
        # The same three steps as runtime.preprocessing.normalize, so that the bits are the same.
        steps = (("Div", [255.0]), ("Sub", list(self._spec.mean)), ("Div", list(self._spec.std)))
        for number, (op, numbers) in enumerate(steps):
            array = np.asarray(numbers, np.float32).reshape(1, -1, 1, 1)
            constant = add_initializer(graph, f"{_PREFIX}normalize_{number}", array)
            value = _append(nodes, op, [value, constant], wide, ir.DataType.FLOAT)
        for node, position in list(image.uses()):
            node.replace_input_with(position, value)
        value.name = f"{_PREFIX}normalized"
        graph.inputs[0] = pixels
        graph.insert_before(next(iter(graph)), nodes)
        return ir.passes.PassResult(model, modified=True)


class ProbabilityOutput(ir.passes.InPlacePass):
    """Makes the graph give probabilities, `probs`."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        logits = graph.outputs[0]
        assert logits.shape is not None
        nodes: list[ir.Node] = []
        probabilities = _append(nodes, "Softmax", [logits], logits.shape, ir.DataType.FLOAT, {"axis": -1})
        probabilities.name = "probs"
        graph.extend(nodes)
        graph.outputs[0] = probabilities
        return ir.passes.PassResult(model, modified=True)


class TopKOutput(ir.passes.InPlacePass):
    """Makes a graph of `probs` give the `k` largest, and `classes`, their int64 indices."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self._k = k

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        all_probs = graph.outputs[0]
        assert all_probs.shape is not None
        all_probs.name = f"{_PREFIX}all_probs"
        count = add_initializer(graph, f"{_PREFIX}k", np.asarray([self._k], np.int64))
        node = ir.Node("", "TopK", [all_probs, count], num_outputs=2, name=f"{_PREFIX}topk")
        shape = ir.Shape([all_probs.shape[0], self._k])
        for value, name, kind in zip(
            node.outputs, ("probs", "classes"), (ir.DataType.FLOAT, ir.DataType.INT64), strict=True
        ):
            value.name, value.shape, value.type = name, shape, ir.TensorType(kind)
        graph.append(node)
        graph.outputs[:] = node.outputs
        return ir.passes.PassResult(model, modified=True)


class HalfInput(ir.passes.InPlacePass):
    """Makes the graph take FP16; a Cast to FP16 right behind the input falls away."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        image = graph.inputs[0]
        given = ir.Value(name=image.name, shape=image.shape, type=ir.TensorType(ir.DataType.FLOAT16))
        image.name = f"{_PREFIX}wide_input"
        graph.inputs[0] = given
        for node, _ in list(image.uses()):
            if node.op_type == "Cast" and node.outputs[0].dtype == ir.DataType.FLOAT16:
                ir.convenience.replace_all_uses_with(node.outputs[0], given)
                graph.remove(node, safe=True)
        if image.uses():
            nodes: list[ir.Node] = []
            wide = _append(nodes, "Cast", [given], image.shape, ir.DataType.FLOAT, {"to": int(ir.DataType.FLOAT)})
            ir.convenience.replace_all_uses_with(image, wide)
            graph.insert_before(next(iter(graph)), nodes)
        return ir.passes.PassResult(model, modified=True)


class HalfOutput(ir.passes.InPlacePass):
    """Makes the graph's float32 outputs FP16; a Cast to float32 right before one falls away."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        for position, value in enumerate(graph.outputs):
            producer = value.producer()
            if value.dtype != ir.DataType.FLOAT or producer is None:
                continue
            name, source = value.name, producer.inputs[0]
            if producer.op_type == "Cast" and source is not None and source.dtype == ir.DataType.FLOAT16:
                graph.outputs[position] = source
                graph.remove(producer, safe=True)
                source.name = name
                continue
            value.name = f"{_PREFIX}wide_{name}"
            nodes: list[ir.Node] = []
            half = _append(nodes, "Cast", [value], value.shape, ir.DataType.FLOAT16, {"to": int(ir.DataType.FLOAT16)})
            nodes[0].name, half.name = f"{_PREFIX}half_{name}", name
            graph.extend(nodes)
            graph.outputs[position] = half
        return ir.passes.PassResult(model, modified=True)


def _append(
    nodes: list[ir.Node],
    op: str,
    inputs: list[ir.Value],
    shape: ir.Shape | None,
    kind: ir.DataType,
    attributes: Mapping[str, int | list[int]] | None = None,
) -> ir.Value:
    node = ir.node(op, inputs, attributes or {}, name=f"{_PREFIX}{op.lower()}_{len(nodes)}")
    output = node.outputs[0]
    output.name, output.shape, output.type = f"{node.name}_out", shape, ir.TensorType(kind)
    nodes.append(node)
    return output
