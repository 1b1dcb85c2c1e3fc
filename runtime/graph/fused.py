"""Replace the fused operators that ONNX Runtime's optimizer writes with standard operators.

Source of their definitions: ONNX Runtime, docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from runtime.errors import ModelFileError
from runtime.graph.model import without_weights
from runtime.graph.shapes import Inferred, infer
from runtime.graph.structure import describe_node, opset_of, tensor_names, unused_names

__all__ = ["has_fused_operators", "lower_fused_operators"]

_DOMAIN = "com.microsoft"


def has_fused_operators(model: onnx.ModelProto) -> bool:
    """Return whether `lower_fused_operators` would replace a node."""
    return any(node.domain == _DOMAIN and node.op_type in _LOWERINGS for node in model.graph.node)


def lower_fused_operators(model: onnx.ModelProto, *, others_allowed: bool = False) -> None:
    """Replace fused operators in place, and check that all others are standard ones.

    Args:
        model: a graph of opset 20 or later.
        others_allowed: leave other operators that are not standard in the graph.

    Raises:
        ModelFileError: an operator is not part of ONNX, or a fused operator has a form that
            standard operators do not have; the message names the node.
    """
    opset = opset_of(model)
    found: list[onnx.NodeProto] = []
    lowering = _Lowering(model, found)
    for node in model.graph.node:
        lower = _LOWERINGS.get(node.op_type) if node.domain == _DOMAIN else None
        if lower is not None:
            found += lower(lowering, node)
        elif others_allowed or _is_standard(node, opset):
            found.append(node)
        else:
            raise _not_standard(node)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in found]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    if not others_allowed:
        del model.opset_import[:]
        model.opset_import.append(helper.make_opsetid("", opset))


def _is_standard(node: onnx.NodeProto, opset: int) -> bool:
    return node.domain in ("", "ai.onnx") and onnx.defs.has(node.op_type, opset)


def _not_standard(node: onnx.NodeProto) -> ModelFileError:
    return ModelFileError(
        f"{describe_node(node)} is not an ONNX operator; expected standard operators only. Export the model again "
        "without custom operators, or use the file from before another tool optimized it"
    )


class _Lowering:
    """Creates the nodes and constants that replace fused operators."""

    def __init__(self, model: onnx.ModelProto, lowered: list[onnx.NodeProto]) -> None:
        self._model = model
        self._lowered = lowered  # the nodes before the current one
        self._unused = unused_names(tensor_names(model.graph))

    def node(self, op: str, inputs: Sequence[str], output: str, name: str, **attributes: Any) -> onnx.NodeProto:
        present = list(inputs)
        while present and not present[-1]:
            present.pop()
        return helper.make_node(op, present, [output], name, **attributes)

    def tensor(self, node: onnx.NodeProto, suffix: str) -> str:
        """Return an unused tensor name."""
        return self._unused(f"{node.output[0]}_{suffix}")

    def constant(self, node: onnx.NodeProto, suffix: str, value: Any) -> str:
        """Add a constant of the type of the node's data and return its name."""
        name = self.tensor(node, suffix)
        kind = self._infer().types.get(node.input[0], onnx.TensorProto.FLOAT)
        array = np.asarray(value, helper.tensor_dtype_to_np_dtype(kind))
        self._model.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def _infer(self) -> Inferred:
        """Infer the tensors that the nodes before the current one compute."""
        before = without_weights(self._model)
        del before.graph.node[:]
        before.graph.node.extend(self._lowered)
        return infer(before, 1)

    def transposed(self, node: onnx.NodeProto, position: int) -> tuple[list[onnx.NodeProto], str]:
        """Return nodes that swap the last two dimensions of an input, and the result's name."""
        source = node.input[position]
        shape = self._infer().shapes.get(source)
        if shape is None:
            raise ModelFileError(
                f"{describe_node(node)} transposes {source!r}, whose number of dimensions is not known; use the file "
                "from before another tool optimized it"
            )
        axes = list(range(len(shape)))
        axes[-2:] = axes[:-3:-1]
        result = self.tensor(node, f"transposed_{position}")
        return [self.node("Transpose", [source], result, f"{node.name}_transpose_{position}", perm=axes)], result

    def activated(
        self, node: onnx.NodeProto, source: str, activation: str, parameters: Sequence[float]
    ) -> onnx.NodeProto:
        """Return the activation that a fused operator ends with."""
        name = f"{node.name}_{activation.lower()}"
        if activation == "Clip":
            bounds = [
                self.constant(node, suffix, value) for suffix, value in zip(("min", "max"), parameters, strict=False)
            ]
            return self.node("Clip", [source, *bounds], node.output[0], name)
        keys = {"LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta"), "Relu": (), "Sigmoid": (), "Tanh": ()}
        if activation not in keys:
            raise ModelFileError(
                f"{describe_node(node)} has the activation {activation!r}; expected one of {', '.join([*keys, 'Clip'])}"
            )
        return self.node(
            activation, [source], node.output[0], name, **dict(zip(keys[activation], parameters, strict=False))
        )


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _fused_conv(lowering: _Lowering, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """act(Conv(X, W, B) + Z)."""
    attributes = _attributes(node)
    activation = _text(attributes.pop("activation", ""))
    parameters = list(attributes.pop("activation_params", []))
    inputs = list(node.input)
    residual = inputs.pop(3) if len(inputs) > 3 else ""
    stages = ["conv", *(["sum"] if residual else []), *(["activation"] if activation else [])]
    outputs = [lowering.tensor(node, stage) for stage in stages[:-1]] + [node.output[0]]
    nodes = [lowering.node("Conv", inputs, outputs[0], node.name, **attributes)]
    if residual:
        nodes.append(lowering.node("Add", [outputs[0], residual], outputs[1], f"{node.name}_sum"))
    if activation:
        nodes.append(lowering.activated(node, outputs[-2], activation, parameters))
    return nodes


def _fused_gemm(lowering: _Lowering, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """act(Gemm(A, B, C))."""
    attributes = _attributes(node)
    activation = _text(attributes.pop("activation", ""))
    keys = ("activation_alpha", "activation_beta", "activation_gamma")
    parameters = [attributes.pop(key) for key in keys if key in attributes]
    inner = lowering.tensor(node, "gemm") if activation else node.output[0]
    nodes = [lowering.node("Gemm", node.input, inner, node.name, **attributes)]
    if activation:
        nodes.append(lowering.activated(node, inner, activation, parameters))
    return nodes


def _fused_matmul(lowering: _Lowering, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """alpha · A · B, with A and B transposed if requested."""
    attributes = _attributes(node)
    if attributes.get("transBatchA") or attributes.get("transBatchB"):
        raise ModelFileError(
            f"{describe_node(node)} transposes batch dimensions; use the file from before another tool optimized it"
        )
    nodes, factors = list[onnx.NodeProto](), list(node.input)
    for position, key in enumerate(("transA", "transB")):
        if attributes.get(key):
            more, factors[position] = lowering.transposed(node, position)
            nodes += more
    alpha = attributes.get("alpha", 1.0)
    product = node.output[0] if alpha == 1 else lowering.tensor(node, "product")
    nodes.append(lowering.node("MatMul", factors, product, node.name))
    if alpha != 1:
        scale = lowering.constant(node, "alpha", alpha)
        nodes.append(lowering.node("Mul", [product, scale], node.output[0], f"{node.name}_scaled"))
    return nodes


def _gelu(approximate: str) -> Callable[[_Lowering, onnx.NodeProto], list[onnx.NodeProto]]:
    """Gelu(X + bias), with an optional bias."""

    def lower(lowering: _Lowering, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        nodes, source = list[onnx.NodeProto](), node.input[0]
        if len(node.input) > 1 and node.input[1]:
            source = lowering.tensor(node, "sum")
            nodes.append(lowering.node("Add", node.input[:2], source, f"{node.name}_sum"))
        return [*nodes, lowering.node("Gelu", [source], node.output[0], node.name, approximate=approximate)]

    return lower


def _quick_gelu(lowering: _Lowering, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """X · sigmoid(alpha · X)."""
    alpha = lowering.constant(node, "alpha", _attributes(node).get("alpha", 1.702))
    scaled, gate = lowering.tensor(node, "scaled"), lowering.tensor(node, "gate")
    return [
        lowering.node("Mul", [node.input[0], alpha], scaled, f"{node.name}_scaled"),
        lowering.node("Sigmoid", [scaled], gate, f"{node.name}_gate"),
        lowering.node("Mul", [node.input[0], gate], node.output[0], node.name),
    ]


def _skip_layer_norm(lowering: _Lowering, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """LayerNormalization(X + skip + bias), and optionally the sum itself."""
    data, skip, gamma, beta, bias = [*node.input, "", ""][:5]
    outputs = [*node.output, "", "", ""][:4]
    if outputs[1] or outputs[2]:
        raise ModelFileError(f"{describe_node(node)} outputs mean and deviation; expected the normalized tensor only")
    total = outputs[3] or lowering.tensor(node, "sum")
    first = lowering.tensor(node, "skipped") if bias else total
    nodes = [lowering.node("Add", [data, skip], first, f"{node.name}_skip")]
    if bias:
        nodes.append(lowering.node("Add", [first, bias], total, f"{node.name}_bias"))
    epsilon = _attributes(node).get("epsilon", 1e-12)
    norm = lowering.node("LayerNormalization", [total, gamma, beta], outputs[0], node.name, axis=-1, epsilon=epsilon)
    return [*nodes, norm]


_LOWERINGS: dict[str, Callable[[_Lowering, onnx.NodeProto], list[onnx.NodeProto]]] = {
    "BiasGelu": _gelu("none"),
    "FastGelu": _gelu("tanh"),
    "FusedConv": _fused_conv,
    "FusedGemm": _fused_gemm,
    "FusedMatMul": _fused_matmul,
    "Gelu": _gelu("none"),
    "QuickGelu": _quick_gelu,
    "SkipLayerNormalization": _skip_layer_norm,
}
