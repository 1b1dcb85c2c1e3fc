"""Multiply and shift the channels of a tensor by changing the constants of the node that computes it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from runtime.graph.edit import add_initializer, along, array_of, constant_of, unused_name
from runtime.graph.structure import output_channel_axis

__all__ = ["FOLDABLE", "can_rescale", "rescale", "scaled_weight"]

FOLDABLE = ("Conv", "ConvTranspose", "Gemm")
"""Operators whose weights can absorb a factor per output channel."""


def scaled_weight(
    node: ir.Node, weight: NDArray[np.float64], scale_C: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """Return the weights of a FOLDABLE node with scaled output channels; None if that is not exact."""
    if node.op_type == "ConvTranspose":  # (in, out / groups, kernel…); output channels are ordered by group
        groups = node.attributes.get_int("group", 1)
        per_group = weight.reshape(groups, -1, *weight.shape[1:])
        factors = scale_C.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
        return (per_group * factors).reshape(weight.shape)
    if node.attributes.get_float("alpha", 1.0) != 1.0 or node.attributes.get_float("beta", 1.0) != 1.0:
        return None
    transposed = bool(node.attributes.get_int("transB", 0))
    return weight * along(scale_C, output_channel_axis(node.op_type, weight.ndim, transposed=transposed), weight.ndim)


def can_rescale(value: ir.Value, channels: int) -> bool:
    """Return whether `rescale` can change a tensor with this number of channels."""
    node = value.producer()
    if node is None:
        return False
    if node.op_type in FOLDABLE:
        weight, bias = constant_of(node.inputs[1]), constant_of(_input(node, 2))
        if weight is None or (_input(node, 2) is not None and (bias is None or bias.shape != (channels,))):
            return False
        factors = np.ones(channels)
        try:
            return scaled_weight(node, weight.astype(np.float64), factors) is not None
        except ValueError:  # another number of channels
            return False
    return _factor_and_shift(node, channels) is not None


def rescale(graph: ir.Graph, value: ir.Value, scale_C: NDArray[np.float64], shift_C: NDArray[np.float64]) -> None:
    """Make a tensor y hold `scale_C` · y + `shift_C`, in the same nodes.

    It is computed by a FOLDABLE node, or by x · factor + shift as `export.fold.BatchNormToAffine`
    writes it; see `can_rescale`. New constants are rounded once, from float64.
    """
    node = value.producer()
    assert node is not None
    if node.op_type in FOLDABLE:
        weight = array_of(node.inputs[1])
        scaled = scaled_weight(node, weight.astype(np.float64), scale_C)
        assert scaled is not None
        _set_constant(graph, node, 1, scaled.astype(weight.dtype))
        bias = _input(node, 2)
        old = 0.0 if bias is None else array_of(bias).astype(np.float64)
        _set_constant(graph, node, 2, (scale_C * old + shift_C).astype(weight.dtype))
        return
    found = _factor_and_shift(node, len(scale_C))
    assert found is not None
    product, factor_place, shift_place = found
    factor, shift = array_of(product.inputs[factor_place]), array_of(node.inputs[shift_place])
    _set_constant(graph, product, factor_place, _rescaled(factor, scale_C))
    _set_constant(graph, node, shift_place, _rescaled(shift, scale_C, shift_C))


def _rescaled(
    constant: NDArray[np.float32], scale_C: NDArray[np.float64], shift_C: NDArray[np.float64] | float = 0.0
) -> NDArray[np.float32]:
    """Return scale · constant + shift, for a constant of shape (channels, 1, …)."""
    flat = constant.reshape(-1).astype(np.float64)
    return (scale_C * flat + shift_C).astype(constant.dtype).reshape(constant.shape)


def _factor_and_shift(node: ir.Node, channels: int) -> tuple[ir.Node, int, int] | None:
    """Return the Mul of x · factor + shift, the input of the factor, and that of the shift in `node`.

    None if `node` is not such an Add of constants per channel, or others read the product.
    """
    if node.op_type != "Add":
        return None
    shift_place = _constant_input(node, channels)
    product = None if shift_place is None else node.inputs[1 - shift_place]
    mul = None if product is None else product.producer()
    if product is None or shift_place is None or mul is None or mul.op_type != "Mul" or len(product.uses()) != 1:
        return None
    factor_place = _constant_input(mul, channels)
    return None if factor_place is None or product.is_graph_output() else (mul, factor_place, shift_place)


def _constant_input(node: ir.Node, channels: int) -> int | None:
    """Return the input of a binary node that is a constant per channel, or None."""
    for place in (0, 1):
        constant = constant_of(node.inputs[place])
        if constant is not None and constant.size == channels and (constant.ndim < 2 or constant.shape[0] == channels):
            return place
    return None


def _set_constant(graph: ir.Graph, node: ir.Node, place: int, array: NDArray[np.float32]) -> None:
    """Replace a constant input, which other nodes may share, or add it if the node has none."""
    old = _input(node, place)
    if old is not None and len(old.uses()) == 1 and not old.is_graph_output():
        old.const_value = ir.tensor(np.ascontiguousarray(array), name=old.name)
        return
    new = add_initializer(graph, unused_name(graph, f"{node.name}_adapted_{place}"), array)
    if place >= len(node.inputs):
        node.resize_inputs(place + 1)
    node.replace_input_with(place, new)


def _input(node: ir.Node, place: int) -> ir.Value | None:
    return node.inputs[place] if place < len(node.inputs) else None
