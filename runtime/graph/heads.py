"""Find the classifier's output, recognize what it means, and bring it into the form (N, classes)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper

from runtime.errors import ConfigError, ModelFileError, nearest
from runtime.graph.structure import shape_of, spec_of, tensor_names, unused_names

__all__ = ["OutputForm", "output_form", "outputs_probabilities", "reshape_output", "select_output"]

OutputForm: TypeAlias = Literal["logits", "probs", "sigmoid"]
"""`probs` add up to 1, as behind a Softmax. `sigmoid` are independent probabilities."""

_PASSING = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Operators that change neither the values nor their order."""


def select_output(model: onnx.ModelProto, name: str | None) -> None:
    """Remove all outputs except the classifier's, in place.

    Raises:
        ConfigError: there is no output called `name`.
        ModelFileError: there are several outputs, and `name` is None.
    """
    outputs = list(model.graph.output)
    names = [value.name for value in outputs]
    if name is None:
        if len(outputs) != 1:
            listed = ", ".join(f"{value.name} {list(shape_of(value.type.tensor_type))}" for value in outputs)
            raise ModelFileError(
                f"the graph has {len(outputs)} outputs: {listed or 'none'}; expected one. Choose the classifier's "
                "output with --output NAME"
            )
        return
    if name not in names:
        raise ConfigError(
            f"no output is called {name!r}; the outputs are {', '.join(names)}; {nearest(name, names)}".rstrip("; ")
        )
    kept = onnx.ValueInfoProto()
    kept.CopyFrom(outputs[names.index(name)])
    del model.graph.output[:]
    model.graph.output.append(kept)


def output_form(model: onnx.ModelProto) -> OutputForm:
    """Return what the graph's first output holds, by the last operator that changes values."""
    producers = {name: node for node in model.graph.node for name in node.output}
    node = producers.get(model.graph.output[0].name)
    seen: set[str] = set()
    while node is not None and node.op_type in _PASSING and node.input[0] not in seen:
        seen.add(node.input[0])
        node = producers.get(node.input[0])
    if node is None:
        return "logits"
    return {"Softmax": "probs", "Sigmoid": "sigmoid"}.get(node.op_type, "logits")  # type: ignore[return-value]


def outputs_probabilities(model: onnx.ModelProto) -> bool:
    """Return whether the first output holds probabilities, by the model's spec if it has one."""
    spec = spec_of(model, "the model")
    return (output_form(model) if spec is None else spec.output_form) != "logits"


def reshape_output(model: onnx.ModelProto, shape: tuple[int, ...], form: OutputForm) -> tuple[int, OutputForm]:
    """Flatten (N, K, 1, 1) to (N, K), and turn one value per image into two classes, in place.

    A single logit z becomes the logits (−z / 2, z / 2): their softmax is (1 − sigmoid(z),
    sigmoid(z)). A single probability p becomes (1 − p, p).

    Args:
        model: a float32 graph with one output.
        shape: the output's shape at some batch size.
        form: from `output_form`.

    Returns:
        The number of classes, and the form of the new output.

    Raises:
        ModelFileError: the output has another shape.
    """
    sizes = [size for size in shape[1:] if size != 1]
    if not shape or len(sizes) > 1:
        raise ModelFileError(
            f"the output {model.graph.output[0].name!r} has the shape {list(shape)}; expected [N, classes]. If the "
            "graph has another output with one value per class, choose it with --output NAME"
        )
    classes = sizes[0] if sizes else 1
    unused = unused_names(tensor_names(model.graph))
    if len(shape) != 2:
        shape_name = unused("advprop_output_shape")
        model.graph.initializer.append(numpy_helper.from_array(np.asarray([-1, classes], np.int64), shape_name))
        _append_node(model, "Reshape", [shape_name], unused)
    if classes > 1:
        return classes, form
    if form == "logits":
        _append_node(model, "Mul", [_constant(model, [[-0.5, 0.5]], unused)], unused)
        return 2, "logits"
    _append_node(model, "Mul", [_constant(model, [[-1, 1]], unused)], unused)
    _append_node(model, "Add", [_constant(model, [[1, 0]], unused)], unused)
    return 2, "probs"


def _constant(model: onnx.ModelProto, values: list[list[float]], unused: Callable[[str], str]) -> str:
    name = unused("advprop_two_classes")
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(values, np.float32), name))
    return name


def _append_node(model: onnx.ModelProto, op: str, others: list[str], unused: Callable[[str], str]) -> None:
    """Append a node behind the output, which takes over the output's name."""
    graph = model.graph
    name = graph.output[0].name
    inner = unused(f"{name}_inner")
    for node in graph.node:
        node.input[:] = [inner if entry == name else entry for entry in node.input]
        node.output[:] = [inner if entry == name else entry for entry in node.output]
    graph.node.append(helper.make_node(op, [inner, *others], [name], f"{inner}_{op}"))
    graph.output[0].type.tensor_type.ClearField("shape")
