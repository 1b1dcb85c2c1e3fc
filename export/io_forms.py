"""What goes in and out of the exported graph: pixels instead of normalised floats,
probabilities instead of logits.

Passes over a graph of float32 NCHW `input` and float32 `logits`; computed in float32
whatever the precision of the network between.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir

from export.initializers import add_initializer
from runtime.spec import METADATA_KEY, ModelSpec, Preprocessing

__all__ = ["PixelInput", "ProbabilityOutput", "with_forms"]

_PREFIX = "advprop/"
"""Names of the nodes made here begin with it."""


def with_forms(model: onnx.ModelProto, spec: ModelSpec) -> onnx.ModelProto:
    """Returns a graph that takes `spec.input_form` and gives `spec.output_form`.

    Args:
        model: a graph of float32 NCHW input and float32 logits, of any precision between;
            not changed.
        spec: goes into the result's metadata.
    """
    graph_model = ir.from_proto(model)
    kind, layout = spec.input_form.split()
    if kind == "uint8":
        PixelInput(spec.preprocessing, layout)(graph_model)
    if spec.output_form == "probs":
        ProbabilityOutput()(graph_model)
    graph_model.metadata_props[METADATA_KEY] = spec.to_json()
    proto = ir.to_proto(graph_model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


class PixelInput(ir.passes.InPlacePass):
    """Makes the graph take uint8 RGB pixels at the network's size and normalise them itself."""

    def __init__(self, spec: Preprocessing, layout: str) -> None:
        """`layout`: NCHW or NHWC."""
        super().__init__()
        self._spec, self._layout = spec, layout

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        image = graph.inputs[0]
        assert image.shape is not None
        batch = image.shape[0]
        height, width = self._spec.height, self._spec.width
        nhwc = self._layout == "NHWC"
        given = ir.Shape([batch, height, width, 3] if nhwc else [batch, 3, height, width])
        pixels = ir.Value(name=image.name, shape=given, type=ir.TensorType(ir.DataType.UINT8))
        wide = ir.Shape([batch, 3, height, width])
        nodes: list[ir.Node] = []
        # Cast first: TensorRT knows uint8 at the edge of a network only.
        value = _append(nodes, "Cast", [pixels], given, ir.DataType.FLOAT, {"to": int(ir.DataType.FLOAT)})
        if nhwc:
            value = _append(nodes, "Transpose", [value], wide, ir.DataType.FLOAT, {"perm": [0, 3, 1, 2]})
        # The same three steps as runtime.images.normalise, so that the bits are the same.
        steps = (("Div", [255.0]), ("Sub", list(self._spec.mean)), ("Div", list(self._spec.std)))
        for number, (op, numbers) in enumerate(steps):
            array = np.asarray(numbers, np.float32).reshape(1, -1, 1, 1)
            constant = add_initializer(graph, f"{_PREFIX}normalise_{number}", array)
            value = _append(nodes, op, [value, constant], wide, ir.DataType.FLOAT)
        for node, position in list(image.uses()):
            node.replace_input_with(position, value)
        value.name = f"{_PREFIX}normalised"
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


def _append(
    nodes: list[ir.Node],
    op: str,
    inputs: list[ir.Value],
    shape: ir.Shape,
    kind: ir.DataType,
    attributes: Mapping[str, int | list[int]] | None = None,
) -> ir.Value:
    node = ir.node(op, inputs, attributes or {}, name=f"{_PREFIX}{op.lower()}_{len(nodes)}")
    output = node.outputs[0]
    output.name, output.shape, output.type = f"{node.name}_out", shape, ir.TensorType(kind)
    nodes.append(node)
    return output
