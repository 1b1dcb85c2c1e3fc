"""Fold BatchNorms with graph passes, in float64 to keep rounding errors out of the weights.

    y = γ (Wx + b − μ) / √(σ² + ε) + β  =  (sW) x + s (b − μ) + β,   s = γ / √(σ² + ε)

`FoldBatchNorm` folds a BatchNorm into a Conv (plain, depthwise or grouped), ConvTranspose or Gemm
whose output only the BatchNorm reads. `BatchNormToAffine` replaces the remaining ones, such as
those before a convolution in DenseNet, by Mul and Add.
"""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from runtime.graph.affine import FOLDABLE, scaled_weight
from runtime.graph.edit import add_initializer, along, array_of, constant_of, make_node, replace_node

__all__ = ["BatchNormToAffine", "FoldBatchNorm"]

log = logging.getLogger(__name__)


class FoldBatchNorm(ir.passes.InPlacePass):
    """Folds each BatchNormalization into the linear node before it.

    If several nodes share a weight, it is folded into a copy. A BatchNormalization that cannot be
    folded is not changed; its name and the reason are logged.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        folded = 0
        for node in list(model.graph):
            if node.op_type != "BatchNormalization":
                continue
            reason = _fold(model.graph, node)
            if reason:
                log.info("BatchNorm %s is not folded: %s", node.name, reason)
            else:
                folded += 1
        return ir.passes.PassResult(model, modified=folded > 0)


class BatchNormToAffine(ir.passes.InPlacePass):
    """Replaces each BatchNormalization by a Mul and an Add per channel."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        replaced = 0
        for node in list(model.graph):
            if node.op_type != "BatchNormalization":
                continue
            parameters = _scale_and_shift(node)
            data, output = node.inputs[0], node.outputs[0]
            if parameters is None or data is None or data.shape is None:
                log.warning("BatchNorm %s is not replaced: its parameters or shape are not constant", node.name)
                continue
            dtype = array_of(node.inputs[1]).dtype
            names = (f"{node.name}_scale", f"{node.name}_shift")
            scale, shift = (
                add_initializer(model.graph, name, along(value, 0, len(data.shape) - 1).astype(dtype))
                for name, value in zip(names, parameters, strict=True)
            )
            product = make_node("Mul", [data, scale], name=f"{node.name}_mul", like=output)
            total = make_node("Add", [product.outputs[0], shift], name=f"{node.name}_add", like=output)
            replace_node(model.graph, node, [product, total])
            replaced += 1
        return ir.passes.PassResult(model, modified=replaced > 0)


def _fold(graph: ir.Graph, batch_norm: ir.Node) -> str:
    """Fold `batch_norm` and return an empty string, or return why it cannot be folded."""
    parameters = _scale_and_shift(batch_norm)
    if parameters is None:
        return "its parameters are not constant"
    data = batch_norm.inputs[0]
    linear = data.producer() if data is not None else None
    if linear is None or linear.op_type not in FOLDABLE:
        return f"it follows {linear.op_type if linear else 'the input'}"
    assert data is not None
    if len(data.uses()) != 1 or data.is_graph_output():
        return f"{linear.op_type} {linear.name} has other readers"
    weight = constant_of(linear.inputs[1])
    bias_value = linear.inputs[2] if len(linear.inputs) > 2 else None
    bias = constant_of(bias_value)
    if weight is None or (bias_value is not None and bias is None):
        return f"the weights of {linear.op_type} {linear.name} are not constant"
    scale, shift = parameters
    new_weight = scaled_weight(linear, weight.astype(np.float64), scale)
    if new_weight is None:
        return f"{linear.op_type} {linear.name} has scalar factors"
    new_bias = shift if bias is None else scale * bias.astype(np.float64) + shift
    inputs = (
        add_initializer(graph, f"{batch_norm.name}_weight", new_weight.astype(weight.dtype)),
        add_initializer(graph, f"{batch_norm.name}_bias", new_bias.astype(weight.dtype)),
    )
    replacement = ir.Node(
        linear.domain,
        linear.op_type,
        [linear.inputs[0], *inputs],
        linear.attributes.values(),
        num_outputs=1,
        name=linear.name,
        metadata_props=dict(linear.metadata_props),
    )
    replace_node(graph, batch_norm, [replacement])
    graph.remove(linear, safe=True)
    return ""


def _scale_and_shift(node: ir.Node) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return s and β − s μ of a BatchNormalization; None if a parameter is not constant."""
    constants = [constant_of(value) for value in node.inputs[1:5]]
    if any(value is None for value in constants) or len(constants) != 4:
        return None
    gamma, beta, mean, variance = (np.asarray(value, np.float64) for value in constants)
    scale = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    return scale, beta - scale * mean
