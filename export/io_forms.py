"""Change the inputs and outputs of an exported graph.

The input can be uint8 pixels or FP16 instead of normalized float32. The output can be
probabilities, or the most probable classes, instead of logits.

The passes edit a graph with float32 NCHW `input` and float32 `logits`. They compute in float32,
whatever the precision of the network.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir

from runtime.graph.edit import add_initializer, make_cast, make_node
from runtime.graph.model import check
from runtime.graph.structure import set_metadata
from runtime.spec import METADATA_KEY, ModelSpec, Preprocessing

__all__ = ["TOP", "HalfInput", "HalfOutput", "PixelInput", "ProbabilityOutput", "TopKOutput", "with_forms"]

TOP = 5
"""Number of classes that a `topk` file outputs; all classes if the model has fewer."""

_PREFIX = "advprop/"
"""Prefix of the names of new nodes."""


def with_forms(model: onnx.ModelProto, spec: ModelSpec, *, half_output: bool = False) -> onnx.ModelProto:
    """Return a graph with the input form `spec.input_form` and the output form `spec.output_form`.

    Args:
        model: a graph with float32 NCHW input and float32 logits that computes in any precision;
            not changed.
        spec: stored in the metadata of the result.
        half_output: output FP16 instead of float32.
    """
    if (spec.input_form, spec.output_form, half_output) == ("float32 NCHW", "logits", False):
        described = onnx.ModelProto()
        described.CopyFrom(model)
        set_metadata(described, {METADATA_KEY: spec.to_json()})
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
    """Changes the input to uint8 RGB pixels at the network's size, which the graph normalizes."""

    def __init__(self, spec: Preprocessing, layout: str) -> None:
        """Set the normalization and the layout of the pixels, `NCHW` or `NHWC`."""
        super().__init__()
        self._spec, self._layout = spec, layout

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        image = graph.inputs[0]
        assert image.shape is not None
        batch, _, height, width = image.shape
        nhwc = self._layout == "NHWC"
        pixel_shape = ir.Shape([batch, height, width, 3] if nhwc else [batch, 3, height, width])
        pixels = ir.Value(name=image.name, shape=pixel_shape, type=ir.TensorType(ir.DataType.UINT8))
        nodes: list[ir.Node] = []
        # The Cast comes first because TensorRT supports uint8 only at the input of a network.
        value = _append(nodes, "Cast", [pixels], like=pixels, attributes={"to": int(ir.DataType.FLOAT)})
        if nhwc:
            value = _append(nodes, "Transpose", [value], like=value, attributes={"perm": [0, 3, 1, 2]})
            value.shape = ir.Shape([batch, 3, height, width])
        # The same steps as in runtime.preprocessing.normalize, which makes the results
        # bit-identical.
        steps = (("Div", [255.0]), ("Sub", list(self._spec.mean)), ("Div", list(self._spec.std)))
        for number, (op, numbers) in enumerate(steps):
            array = np.asarray(numbers, np.float32).reshape(1, -1, 1, 1)
            constant = add_initializer(graph, f"{_PREFIX}normalize_{number}", array)
            value = _append(nodes, op, [value, constant], like=value)
        for node, position in list(image.uses()):
            node.replace_input_with(position, value)
        value.name = f"{_PREFIX}normalized"
        graph.inputs[0] = pixels
        graph.insert_before(next(iter(graph)), nodes)
        return ir.passes.PassResult(model, modified=True)


class ProbabilityOutput(ir.passes.InPlacePass):
    """Changes the output to probabilities, `probs`."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        logits = graph.outputs[0]
        nodes: list[ir.Node] = []
        probabilities = _append(nodes, "Softmax", [logits], like=logits, attributes={"axis": -1})
        probabilities.name = "probs"
        graph.extend(nodes)
        graph.outputs[0] = probabilities
        return ir.passes.PassResult(model, modified=True)


class TopKOutput(ir.passes.InPlacePass):
    """Changes the output to the `k` largest `probs`, and adds `classes`, their int64 indices."""

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
    """Changes the input to FP16 and removes the Casts to FP16 that read it."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        image = graph.inputs[0]
        half = ir.Value(name=image.name, shape=image.shape, type=ir.TensorType(ir.DataType.FLOAT16))
        image.name = f"{_PREFIX}wide_input"
        graph.inputs[0] = half
        for node, _ in list(image.uses()):
            if node.op_type == "Cast" and node.outputs[0].dtype == ir.DataType.FLOAT16:
                ir.convenience.replace_all_uses_with(node.outputs[0], half)
                graph.remove(node, safe=True)
        if image.uses():
            nodes: list[ir.Node] = []
            wide = _append(nodes, "Cast", [half], like=half, attributes={"to": int(ir.DataType.FLOAT)})
            ir.convenience.replace_all_uses_with(image, wide)
            graph.insert_before(next(iter(graph)), nodes)
        return ir.passes.PassResult(model, modified=True)


class HalfOutput(ir.passes.InPlacePass):
    """Changes float32 outputs to FP16 and removes Casts to float32 right before them."""

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
            node = make_cast(value, ir.DataType.FLOAT16, name=f"{_PREFIX}half_{name}", output=name)
            graph.append(node)
            graph.outputs[position] = node.outputs[0]
        return ir.passes.PassResult(model, modified=True)


def _append(
    nodes: list[ir.Node],
    op: str,
    inputs: list[ir.Value],
    *,
    like: ir.Value,
    attributes: Mapping[str, int | list[int]] | None = None,
) -> ir.Value:
    """Append a node to `nodes` and return its output: float32, with the shape of `like`."""
    name = f"{_PREFIX}{op.lower()}_{len(nodes)}"
    node = make_node(
        op, inputs, name=name, output=f"{name}_out", like=like, dtype=ir.DataType.FLOAT, attributes=attributes
    )
    nodes.append(node)
    return node.outputs[0]
