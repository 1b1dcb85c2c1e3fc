"""Convert classifiers of other tools to files that describe themselves, like those of advprop."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from runtime.errors import ConfigError, ModelFileError
from runtime.graph.foreign import ForeignOptions, Layout, convert_command
from runtime.graph.model import infer_shapes
from runtime.graph.norms import NORMS_KEY, adaptable, find_norms, norms_to_json
from runtime.graph.prepare import prepare_classifier
from runtime.graph.read import load_onnx
from runtime.graph.structure import (
    describe_node,
    graph_inputs,
    initializers_of,
    int_attribute,
    set_metadata,
    shape_of,
    spec_of,
)
from runtime.spec import METADATA_KEY, ImageSizes, ModelSpec

__all__ = ["Converted", "convert_classifier"]

_PIXELS_TO_255 = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)
"""Mean and standard deviation that scale pixels to 0–255."""
_MOVES_PIXELS = frozenset({"Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that can stand between a uint8 input and its Cast to floats."""

_QUANTIZED = frozenset(
    {"ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul"}
)
"""Operators of quantized graphs."""


class Converted(NamedTuple):
    """A converted classifier."""

    model: onnx.ModelProto
    """Float32 graph from `input`, normalized (N, 3, H, W), to `logits` or `probs`, (N, K)."""
    spec: ModelSpec
    """The spec in the graph's metadata."""
    notes: tuple[str, ...]
    """One line per change of the graph that a user may want to know."""


def convert_classifier(path: Path, options: ForeignOptions) -> Converted:
    """Read a classifier of another tool, and return it as a graph like those that advprop exports.

    BatchNorms are folded and recorded (see `runtime.graph.norms`), all types and shapes are known,
    and nodes have unique names.

    Args:
        path: a float32 ONNX classifier of images, without a spec.
        options: what the file does not contain.

    Raises:
        ConfigError: the options do not fit the file.
        ModelFileError: the file is not such a classifier, or contains parts that cannot be
            converted; the message names them.
    """
    model = _read(path)
    if spec_of(model, str(path)) is not None:
        raise ConfigError(
            f"{path} contains an advprop.spec, which describes its input and output",
            fix="use the file as it is, and remove the options for files of other tools (--img-size, --mean, …)",
        )
    image = _image_input(path, model)
    options = _with_normalization(path, model, image, options)
    layout = options.layout or _layout_of(path, image)
    height, width = _set_image_size(path, image, layout, options.image_sizes)
    norms = find_norms(ir.from_proto(model).graph)
    prepared = prepare_classifier(model, output=options.output, layout=layout, size=(height, width))
    model = prepared.model
    if options.bgr:
        _swap_channels(model)
    _rename(model, model.graph.input[0].name, "input")
    _rename(model, model.graph.output[0].name, prepared.spec_form)
    spec = options.spec(path.stem, options.preprocessing(height, width), prepared.classes, prepared.spec_form)
    kept = norms_to_json(adaptable(ir.from_proto(model).graph, norms)) if norms else ""
    set_metadata(model, {METADATA_KEY: spec.to_json(), NORMS_KEY: kept})
    return Converted(model, spec, tuple(prepared.notes))


def _read(path: Path) -> onnx.ModelProto:
    """Read a file and its external weights, and check that it computes in float32."""
    model: onnx.ModelProto = load_onnx(path)
    quantized = next((node for node in model.graph.node if node.op_type in _QUANTIZED), None)
    if quantized is not None:
        raise ModelFileError(
            f"{path} is quantized already: it contains {quantized.op_type} {quantized.name!r}",
            fix="use the float32 file that it was made from",
        )
    kinds = {tensor.data_type for tensor in model.graph.initializer} & {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    if kinds:
        names = " and ".join(TensorProto.DataType.Name(kind) for kind in sorted(kinds))
        raise ModelFileError(f"{path} has {names} weights", fix="use the float32 file that it was made from")
    return model


def _image_input(path: Path, model: onnx.ModelProto) -> onnx.ValueInfoProto:
    inputs = graph_inputs(model.graph)
    described = ", ".join(f"{value.name} {list(shape_of(value.type.tensor_type))}" for value in inputs)
    if len(inputs) != 1 or len(inputs[0].type.tensor_type.shape.dim) != 4:
        raise ModelFileError(
            f"{path} has {len(inputs)} inputs ({described}); expected one input of images with four dimensions"
        )
    value: onnx.ValueInfoProto = inputs[0]
    return value


def _layout_of(path: Path, image: onnx.ValueInfoProto) -> Layout:
    sizes = shape_of(image.type.tensor_type)
    if (sizes[1] == 3) == (sizes[3] == 3):
        raise ModelFileError(
            f"{path} has input {list(sizes)}, whose channels could be in the second or last dimension",
            fix="pass --layout NCHW (channels first) or --layout NHWC (channels last)",
        )
    return "NCHW" if sizes[1] == 3 else "NHWC"


def _with_normalization(
    path: Path, model: onnx.ModelProto, image: onnx.ValueInfoProto, options: ForeignOptions
) -> ForeignOptions:
    """Return the options with the mean and standard deviation of the file's input.

    A uint8 input, which `prepare_classifier` changes to float32, contains pixels from 0 to 255.
    """
    if image.type.tensor_type.elem_type == TensorProto.UINT8:
        if options.mean is not None:
            raise ConfigError(
                f"{path} has uint8 input, which the file normalizes itself", fix="remove --mean and --std"
            )
        _check_pixel_readers(path, model, image.name)
        mean, std = _PIXELS_TO_255
        return dataclasses.replace(options, mean=mean, std=std)
    if options.mean is None:
        raise ConfigError(
            f"{path} does not contain the normalization of its images",
            fix=f"pass --mean and --std of the pixels in [0, 1]: {convert_command(path)}",
        )
    return options


def _check_pixel_readers(path: Path, model: onnx.ModelProto, name: str) -> None:
    """Check that a uint8 input is only moved and cast to floats, as a float32 input can be."""
    moved = {name}
    for node in model.graph.node:
        if not moved & set(node.input):
            continue
        if node.op_type == "Cast" and int_attribute(node, "to", 0) == TensorProto.FLOAT:
            continue
        if node.op_type not in _MOVES_PIXELS or node.input[0] not in moved:
            raise ModelFileError(
                f"{path}: {describe_node(node)} computes with uint8 pixels; expected a Cast to float first",
                fix="export the network with a float32 input",
            )
        moved.update(node.output)


def _set_image_size(path: Path, image: onnx.ValueInfoProto, layout: str, sizes: ImageSizes | None) -> tuple[int, int]:
    """Set the image size of a graph, unless `sizes` is a range; return the usual height and width."""
    tensor = image.type.tensor_type
    axes = (2, 3) if layout == "NCHW" else (1, 2)
    found = tuple(shape_of(tensor)[axis] for axis in axes)
    if sizes is None:
        if min(found) < 1:
            raise ConfigError(
                f"{path} accepts images of several sizes ({_text(found)} pixels)",
                fix="set the size with --img-size HxW, or a range with --img-size MIN:OPT:MAX",
            )
        return found[0], found[1]
    if any(have > 0 and (have != want or not sizes.fixed) for have, want in zip(found, sizes.usual, strict=True)):
        raise ConfigError(
            f"{path} has images of {_text(found)} pixels, and --img-size is {sizes}", fix="remove --img-size"
        )
    if sizes.fixed:
        for axis, size in zip(axes, sizes.usual, strict=True):
            tensor.shape.dim[axis].dim_value = size
    return sizes.usual


def _text(size: tuple[int, ...]) -> str:
    return " × ".join("any" if length < 1 else str(length) for length in size)


def _infer_again(model: onnx.ModelProto) -> None:
    """Replace all types and shapes of a graph whose input has changed."""
    del model.graph.value_info[:]
    model.graph.value_info.extend(infer_shapes(model).value_info)


def _swap_channels(model: onnx.ModelProto) -> None:
    """Change a graph whose input is BGR to accept RGB."""
    graph = model.graph
    name = graph.input[0].name
    readers = [node for node in graph.node if name in node.input]
    weights = _convolution_weights(graph, readers)
    for weight in weights:
        _reverse_inputs(weight)
    if weights:
        return
    order, swapped = _unused(graph, "bgr_order"), _unused(graph, "bgr")
    graph.initializer.append(numpy_helper.from_array(np.asarray([2, 1, 0], np.int64), order))
    for node in readers:
        node.input[:] = [swapped if text == name else text for text in node.input]
    graph.node.insert(0, helper.make_node("Gather", [name, order], [swapped], name=_unused(graph, "bgr_node"), axis=1))
    _infer_again(model)


def _convolution_weights(graph: onnx.GraphProto, readers: list[onnx.NodeProto]) -> list[onnx.TensorProto]:
    """Return the weights of `readers` if they are convolutions of all channels; otherwise []."""
    if not all(node.op_type == "Conv" and int_attribute(node, "group", 1) == 1 for node in readers):
        return []
    names = {node.input[1] for node in readers}
    shared = {name for node in graph.node if node not in readers for name in node.input} & names
    constants = initializers_of(graph)
    return [] if shared or not names <= set(constants) else [constants[name] for name in names]


def _reverse_inputs(tensor: onnx.TensorProto) -> None:
    """Reverse the input channels of a convolution's weights, (out, in, kernel…)."""
    weights: NDArray[np.float32] = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(weights[:, ::-1]), tensor.name))


def _rename(model: onnx.ModelProto, old: str, new: str) -> None:
    """Rename a tensor; another tensor with the new name is renamed too."""
    if old == new:
        return
    graph = model.graph
    changes = {old: new, new: _unused(graph, new)}
    for node in graph.node:
        node.input[:] = [changes.get(name, name) for name in node.input]
        node.output[:] = [changes.get(name, name) for name in node.output]
    for value in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
        value.name = changes.get(value.name, value.name)


def _unused(graph: onnx.GraphProto, name: str) -> str:
    """Return `name`, with a number if a tensor or node of the graph has it."""
    known = {text for node in graph.node for text in (*node.input, *node.output, node.name)}
    known |= {value.name for value in (*graph.initializer, *graph.input)}
    number = 1
    found = name
    while found in known:
        number += 1
        found = f"{name}_{number}"
    return found
