"""Prepare ONNX classifiers of other tools: one step for calibration, conversion and builds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from runtime.errors import ModelFileError, first_line
from runtime.graph.batch import BATCH_NAME, open_reshapes, set_batch
from runtime.graph.equivalence import Layout, Reference, image_input
from runtime.graph.heads import OutputForm, output_form, reshape_output, select_output
from runtime.graph.model import check, split_weights
from runtime.graph.optimize import optimize
from runtime.graph.shapes import annotate, fold_shape_values, infer
from runtime.graph.standard import name_nodes, remove_unused, standard_form
from runtime.graph.structure import describe_node, graph_inputs, shape_of, tensor_names, unused_names

__all__ = ["Layout", "PreparedClassifier", "prepare_classifier"]

_SUM_TOLERANCE = 1e-3
"""Largest difference from 1 of the sum of an image's probabilities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedClassifier:
    """A classifier of images in the form that advprop works with."""

    model: onnx.ModelProto
    """Float32 graph of standard operators with one input (N, 3, H, W), one output (N, classes), and
    a declared type for every tensor. N is open unless the graph works for one batch size only."""
    input_name: str
    """Name of the image input."""
    output_name: str
    """Name of the output."""
    output_form: OutputForm
    """What the output holds."""
    layout: Layout
    """Layout of the images in the original file."""
    classes: int
    """Number of classes."""
    notes: tuple[str, ...]
    """What was changed or assumed, for the user."""

    @property
    def spec_form(self) -> str:
        """The output's form in a spec, one of `runtime.spec.OUTPUT_FORMS`."""
        return "logits" if self.output_form == "logits" else "probs"


def prepare_classifier(
    model: onnx.ModelProto,
    *,
    output: str | None = None,
    layout: Layout | None = None,
    size: tuple[int, int] | None = None,
) -> PreparedClassifier:
    """Prepare a float32 classifier that another tool wrote.

    Args:
        model: the classifier, with its weights; not changed.
        output: name of the classifier's output; required if the graph has several.
        layout: layout of the images (default: by the position of the three channels).
        size: height and width of the images, if the graph leaves them open.

    Raises:
        ConfigError: `output` or `layout` does not fit the graph.
        ModelFileError: the graph is not a classifier of images, or has an operator that cannot be
            handled; the message names the node.
    """
    notes: list[str] = []
    image = image_input(model)
    chosen = layout or _find_layout(image)
    light, weights = split_weights(model)
    standard = standard_form(light, size)
    select_output(standard, output)
    remove_unused(standard)
    _set_input(standard, chosen, notes)
    reference = Reference(model, standard.graph.output[0].name, chosen, size)
    prepared = _with_open_batch(standard, weights, reference, notes)
    fold_shape_values(prepared)
    remove_unused(prepared)
    name_nodes(prepared)
    inferred = infer(prepared, reference.batch, reference.size)
    form, expected = output_form(prepared), reference.outputs
    if form == "logits" and _adds_up_to_one(expected):
        form = "probs"
        notes.append("the outputs of each image add up to 1: they are taken as probabilities")
    name = prepared.graph.output[0].name
    shape = inferred.shapes.get(name) or (() if expected is None else expected.shape)
    classes, form = reshape_output(prepared, shape, form)
    if shape[1:] == (1,):
        notes.append("the graph has one output value per image: it becomes two classes, no (0) and yes (1)")
    annotate(prepared, size)
    _check_types(prepared)
    return PreparedClassifier(
        model=prepared,
        input_name=image.name,
        output_name=name,
        output_form=form,
        layout=chosen,
        classes=classes,
        notes=tuple(notes),
    )


def _find_layout(image: onnx.ValueInfoProto) -> Layout:
    sizes = shape_of(image.type.tensor_type)
    return "NHWC" if sizes[3] == 3 and sizes[1] != 3 else "NCHW"


def _set_input(model: onnx.ModelProto, layout: Layout, notes: list[str]) -> None:
    """Make the input float32 (N, 3, H, W), with a name of its own for each open size."""
    value = graph_inputs(model.graph)[0]
    kind = value.type.tensor_type
    batch, *image = shape_of(kind)
    if layout == "NHWC":
        image = [image[2], *image[:2]]
    if image[0] not in (3, -1):
        raise ModelFileError(
            f"the input {value.name!r} has {image[0]} channels in the layout {layout} (shape {list(shape_of(kind))}); "
            "expected 3. Choose another layout with --layout"
        )
    if kind.elem_type == TensorProto.UINT8:
        notes.append("the input is uint8 pixels: it becomes float32 with the same values, 0 to 255")
    names = (BATCH_NAME, "", "height", "width")
    sizes = [length if length > 0 else name for length, name in zip((batch, 3, *image[1:]), names, strict=True)]
    value.type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, sizes))
    if layout == "NHWC":
        _insert_transpose(model, value.name)
        notes.append("the images are channels-last (NHWC): the graph now takes NCHW")


def _insert_transpose(model: onnx.ModelProto, name: str) -> None:
    graph = model.graph
    inner = unused_names(tensor_names(graph))(f"{name}_nhwc")
    for node in graph.node:
        node.input[:] = [inner if entry == name else entry for entry in node.input]
    node = helper.make_node("Transpose", [name], [inner], f"{inner}_transpose", perm=[0, 2, 3, 1])
    graph.node.insert(0, node)


def _with_open_batch(
    model: onnx.ModelProto, weights: Mapping[str, onnx.TensorProto], reference: Reference, notes: list[str]
) -> onnx.ModelProto:
    """Return the optimized graph, with an open batch size if it works for any batch size."""
    batch = reference.batch
    counts = sorted({1, batch, batch + 1})
    try:
        opened = optimize(set_batch(model, 0), weights)
        if reference.agrees(opened, counts):
            if reference.is_fixed:
                notes.append(f"the fixed batch size {batch} is now open")
            return opened
        opened = optimize(open_reshapes(opened, batch, reference.size))
        if reference.agrees(opened, counts):
            notes.append(f"shapes that were fixed to a batch size of {batch} now follow the batch size")
            return opened
    except ModelFileError:
        pass  # the graph is only valid for the batch size that it declares
    fixed = optimize(set_batch(model, batch), weights)
    if not reference.agrees(fixed, [batch]):
        raise ModelFileError(
            "the prepared graph does not compute what the original graph computes; expected equal outputs on random "
            "images. Export the model again, with opset 20 and without other optimizations"
        )
    notes.append(f"the graph works with a batch size of {batch} only; export it with a dynamic batch size for others")
    return fixed


def _adds_up_to_one(outputs: NDArray[Any] | None) -> bool:
    if outputs is None or outputs.ndim < 2 or outputs[0].size < 2:
        return False
    sums = outputs.reshape(len(outputs), -1).sum(1)
    return bool((outputs >= 0).all() and np.abs(sums - 1).max() < _SUM_TOLERANCE)


def _check_types(model: onnx.ModelProto) -> None:
    """Raise ModelFileError if the type of a tensor is not known, or the graph is not valid."""
    known = {value.name for value in (*model.graph.value_info, *model.graph.output)}
    for node in model.graph.node:
        for name in node.output:
            if name and name not in known:
                raise ModelFileError(
                    f"the type of {name!r}, which {describe_node(node)} computes, cannot be inferred; expected "
                    "operators with known output types"
                )
    try:
        check(model)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelFileError(f"the prepared graph is not valid ONNX: {first_line(error)}") from error
