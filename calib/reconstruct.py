"""Learn whether each weight is rounded up or down, to minimize output errors (AdaRound).

Layers are processed in graph order. Each layer reads the output of the network quantized so far,
and its target is the output of the float32 layer. Gradient descent optimizes a soft rounding choice
that a regularizer pushes toward 0 or 1. The remaining mean error is corrected in the bias.

Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (2004.10568).
The rectified sigmoid, the regularizer, the schedule and the asymmetric form, in which a layer reads
quantized activations, are from this paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor

from calib.layer_errors import output_channels
from calib.placement import Point
from calib.quantize import dequantized_inputs, quantize, quantize_weight
from calib.thresholds import LEVELS
from runtime.graph.edit import along
from runtime.graph.model import open_session, with_outputs
from runtime.graph.structure import initializers_of
from runtime.system.image_sources import spread

__all__ = ["reconstruct"]

_BATCH = 8
_MAX_IMAGES = 32
_LEARNING_RATE = 1e-2
_REGULARIZATION = 0.01
_SHARPNESS = (20.0, 2.0)
"""β of the regularizer in its first and in its last step."""
_WARMUP = 0.2
"""Share of the steps without the regularizer."""
_LOW, _HIGH = -0.1, 1.1
"""Range of the sigmoid before it is clipped to [0, 1]."""


class _Layer(NamedTuple):
    """A layer, its quantized inputs and its target outputs."""

    node: onnx.NodeProto
    point: Point
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    inputs: Tensor
    """From the network quantized so far."""
    targets: Tensor
    """From the float32 network."""


def reconstruct(
    model: onnx.ModelProto,
    points: Sequence[Point],
    thresholds: dict[str, float],
    batches: Iterable[NDArray[np.float32]],
    seed: int = 0,
    steps: int = 400,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, NDArray[np.int8]], dict[str, NDArray[np.float64]]]:
    """Learn the rounding of the weights of each quantized layer.

    Args:
        model: the float32 graph.
        points: from `points_of`. Points with `int8` set are reconstructed, except layers that share
            their weights, ConvTranspose, convolutions with automatic padding, and Gemm with
            factors.
        thresholds: tensor → clipping threshold (amax).
        batches: images; at most 32 are used, evenly spaced.
        seed: seed of the image order.
        steps: gradient descent steps per layer.
        progress: called after each layer with 1.

    Returns:
        Node → int8 weights, and node → correction of its bias, (channels,), as `quantize` expects
        them.
    """
    images = np.stack(spread(list(np.concatenate(list(batches))), _MAX_IMAGES))
    nodes = {node.name: node for node in model.graph.node}
    constants = initializers_of(model.graph)
    readers = [name for node in model.graph.node for name in node.input]
    exact = _Probe(model, [nodes[point.node].output[0] for point in points if point.int8])
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, NDArray[np.int8]] = {}
    biases: dict[str, NDArray[np.float64]] = {}
    for point in points:
        node = nodes[point.node]
        if point.int8 and readers.count(point.weight) == 1 and _is_supported(node):
            before = quantize(model, points, thresholds, biases=biases, weights=weights)
            activation, _ = dequantized_inputs(before, [point])[point.node]
            bias = constants.get(node.input[2]) if len(node.input) > 2 else None
            layer = _Layer(
                node=node,
                point=point,
                weight=np.array(numpy_helper.to_array(constants[point.weight])),
                bias=None if bias is None else np.array(numpy_helper.to_array(bias)),
                inputs=_Probe(before, [activation]).values(images, activation),
                targets=exact.values(images, node.output[0]),
            )
            weights[point.node], biases[point.node] = _learn_rounding(layer, steps, generator)
        if point.int8 and progress:
            progress(1)
    return weights, biases


class _Probe:
    """Reads inner tensors of a graph and computes only what they depend on."""

    def __init__(self, model: onnx.ModelProto, tensors: Iterable[str]) -> None:
        import onnxruntime as ort

        self._session = open_session(with_outputs(model, tensors))
        self._options = ort.RunOptions()
        self._options.only_execute_path_to_fetches = True

    def values(self, images: NDArray[np.float32], tensor: str) -> Tensor:
        name = self._session.get_inputs()[0].name
        parts = [
            self._session.run([tensor], {name: images[start : start + _BATCH]}, self._options)[0]
            for start in range(0, len(images), _BATCH)
        ]
        return torch.from_numpy(np.concatenate(parts))


def _learn_rounding(
    layer: _Layer, steps: int, generator: torch.Generator
) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """Return the layer's int8 weights and the correction of its bias."""
    _, scales = quantize_weight(layer.weight, layer.point.axis)
    scale = torch.from_numpy(along(scales, layer.point.axis, layer.weight.ndim))
    ratio = torch.from_numpy(layer.weight) / scale
    floor = ratio.floor()
    start = ((ratio - floor) - _LOW) / (_HIGH - _LOW)
    choice = torch.log(start / (1 - start)).requires_grad_(True)
    optimizer = torch.optim.Adam([choice], lr=_LEARNING_RATE)
    power = layer.targets.square().mean().clamp_min(1e-12)
    warmup = int(_WARMUP * steps)
    for step in range(steps):
        rows = torch.randperm(len(layer.inputs), generator=generator)[:_BATCH]
        up = _round_up(choice)
        output = _run(layer, layer.inputs[rows], scale * (floor + up).clamp(-LEVELS, LEVELS))
        loss = (output - layer.targets[rows]).square().mean() / power
        if step >= warmup:
            done = (step - warmup) / (steps - warmup)
            sharpness = _SHARPNESS[1] + 0.5 * (_SHARPNESS[0] - _SHARPNESS[1]) * (1 + np.cos(np.pi * done))
            loss = loss + _REGULARIZATION / choice.numel() * (1 - (2 * up - 1).abs().pow(sharpness)).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        learned = (floor + (_round_up(choice) >= 0.5)).clamp(-LEVELS, LEVELS)
        nearest = ratio.round().clamp(-LEVELS, LEVELS)
        tried = [(integers, _output_error(layer, scale * integers)) for integers in (nearest, learned)]
        integers, error = min(tried, key=lambda pair: float(pair[1].square().mean()))
    channels = output_channels(layer.point.op, error.ndim)
    shift = error.double().mean([axis for axis in range(error.ndim) if axis != channels])
    return integers.to(torch.int8).numpy(), -shift.numpy()


def _round_up(choice: Tensor) -> Tensor:
    """Return how far each weight is rounded up, 0 to 1: the rectified sigmoid."""
    return (torch.sigmoid(choice) * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def _output_error(layer: _Layer, weight: Tensor) -> Tensor:
    parts = [
        _run(layer, layer.inputs[start : start + _BATCH], weight) - layer.targets[start : start + _BATCH]
        for start in range(0, len(layer.inputs), _BATCH)
    ]
    return torch.cat(parts)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _is_supported(node: onnx.NodeProto) -> bool:
    """Return whether `_run` computes this node."""
    attributes = _attributes(node)
    plain = attributes.get("auto_pad", b"NOTSET") == b"NOTSET" and not attributes.get("transA")
    factors = (attributes.get("alpha", 1.0), attributes.get("beta", 1.0))
    return node.op_type != "ConvTranspose" and plain and factors == (1.0, 1.0)


def _run(layer: _Layer, inputs: Tensor, weight: Tensor) -> Tensor:
    """Compute the node in torch with float32 `weight`."""
    bias = None if layer.bias is None else torch.from_numpy(layer.bias)
    attributes = _attributes(layer.node)
    if layer.point.op in ("Gemm", "MatMul"):
        product = inputs @ (weight.T if attributes.get("transB") else weight)
        return product if bias is None else product + bias
    rank = weight.ndim - 2
    pads = attributes.get("pads") or [0] * (2 * rank)
    stride, dilation = attributes.get("strides") or [1] * rank, attributes.get("dilations") or [1] * rank
    padded = F.pad(inputs, [pad for axis in reversed(range(rank)) for pad in (pads[axis], pads[axis + rank])])
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    output: Tensor = convolve(padded, weight, bias, stride, 0, dilation, attributes.get("group", 1))
    return output
