"""Weights rounded so that each layer's output comes out right, not each weight (AdaRound).

Layer by layer, from the input on: the layer reads what the network quantized so far gives it and is to give what
the float32 one does. Which of its weights are rounded up and which down is learned by gradient descent on a soft
choice that is pressed towards 0 or 1. The mean error that is left goes into the bias.

Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (2004.10568), whose
rectified sigmoid, regulariser and schedule are used; the asymmetric form, in which a layer reads quantized
activations, is theirs too.
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

from calib.placement import Point
from calib.quantize import along, dequantized_names, quantize, quantize_weight
from calib.thresholds import LEVELS
from runtime.graph.model import open_session, with_outputs
from runtime.system.image_sources import spread

__all__ = ["reconstruct"]

_BATCH = 8
_IMAGES = 32
_LEARNING_RATE = 1e-2
_PRESSURE = 0.01
_SHARPNESS = (20.0, 2.0)
"""β of the regulariser, from the first step that has it to the last."""
_FREE = 0.2
"""Share of the steps without the regulariser."""
_LOW, _HIGH = -0.1, 1.1
"""Ends of the sigmoid before it is clipped to [0, 1]."""


class _Layer(NamedTuple):
    """One layer and what it reads and should give."""

    node: onnx.NodeProto
    point: Point
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    inputs: Tensor
    """From the network quantized so far."""
    targets: Tensor
    """Of the float32 network."""


def reconstruct(
    model: onnx.ModelProto,
    points: Sequence[Point],
    thresholds: dict[str, float],
    batches: Iterable[NDArray[np.float32]],
    seed: int = 0,
    steps: int = 400,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, NDArray[np.int8]], dict[str, NDArray[np.float64]]]:
    """Learns how the weights of every quantized layer are rounded.

    Args:
        model: the float32 graph.
        points: from `points_of`; those that are `int8` are reconstructed, unless they share their weights or are
            of a rare kind (ConvTranspose, automatic padding, a Gemm with factors).
        thresholds: tensor → what 127 stands for.
        batches: images; at most 32 are used, spread over them.
        seed: of the order in which images are taken.
        steps: of gradient descent on each layer.
        progress: called after each layer with 1.

    Returns:
        Node → int8 weights, and node → what is added to its bias, (channels,), as `quantize` takes them.
    """
    images = _spread(np.concatenate(list(batches)))
    nodes = {node.name: node for node in model.graph.node}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = [name for node in model.graph.node for name in node.input]
    exact = _Tap(model, [nodes[point.node].output[0] for point in points if point.int8])
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, NDArray[np.int8]] = {}
    biases: dict[str, NDArray[np.float64]] = {}
    for point in points:
        node = nodes[point.node]
        if point.int8 and readers.count(point.weight) == 1 and _can_run(node):
            before = quantize(model, points, thresholds, biases=biases, weights=weights)
            layer = _Layer(
                node=node,
                point=point,
                weight=np.array(numpy_helper.to_array(constants[point.weight])),
                bias=_constant(node, constants),
                inputs=_Tap(before, [dequantized_names(point)[0]]).of(images, dequantized_names(point)[0]),
                targets=exact.of(images, node.output[0]),
            )
            weights[point.node], biases[point.node] = _learned(layer, steps, generator)
        if point.int8 and progress:
            progress(1)
    return weights, biases


class _Tap:
    """Gives inner tensors of a graph, computing no more than they need."""

    def __init__(self, model: onnx.ModelProto, tensors: Iterable[str]) -> None:
        import onnxruntime as ort

        self._session = open_session(with_outputs(model, tensors))
        self._options = ort.RunOptions()
        self._options.only_execute_path_to_fetches = True

    def of(self, images: NDArray[np.float32], tensor: str) -> Tensor:
        name = self._session.get_inputs()[0].name
        few = [
            self._session.run([tensor], {name: images[start : start + _BATCH]}, self._options)[0]
            for start in range(0, len(images), _BATCH)
        ]
        return torch.from_numpy(np.concatenate(few))


def _learned(layer: _Layer, steps: int, generator: torch.Generator) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """The layer's int8 weights, and the correction of its bias."""
    _, scales = quantize_weight(layer.weight, layer.point.axis)
    scale = torch.from_numpy(along(scales, layer.point.axis, layer.weight.ndim))
    ratio = torch.from_numpy(layer.weight) / scale
    floor = ratio.floor()
    start = ((ratio - floor) - _LOW) / (_HIGH - _LOW)
    choice = torch.log(start / (1 - start)).requires_grad_(True)
    optimizer = torch.optim.Adam([choice], lr=_LEARNING_RATE)
    power = layer.targets.square().mean().clamp_min(1e-12)
    free = int(_FREE * steps)
    for step in range(steps):
        rows = torch.randperm(len(layer.inputs), generator=generator)[:_BATCH]
        up = _chosen(choice)
        output = _run(layer, layer.inputs[rows], scale * (floor + up).clamp(-LEVELS, LEVELS))
        loss = (output - layer.targets[rows]).square().mean() / power
        if step >= free:
            done = (step - free) / (steps - free)
            sharpness = _SHARPNESS[1] + 0.5 * (_SHARPNESS[0] - _SHARPNESS[1]) * (1 + np.cos(np.pi * done))
            loss = loss + _PRESSURE / choice.numel() * (1 - (2 * up - 1).abs().pow(sharpness)).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        learned = (floor + (_chosen(choice) >= 0.5)).clamp(-LEVELS, LEVELS)
        nearest = ratio.round().clamp(-LEVELS, LEVELS)
        tried = [(integers, _error(layer, scale * integers)) for integers in (nearest, learned)]
        integers, error = min(tried, key=lambda pair: float(pair[1].square().mean()))
    channels = 1 if layer.point.op in ("Conv", "ConvTranspose") else error.ndim - 1
    shift = error.double().mean([axis for axis in range(error.ndim) if axis != channels])
    return integers.to(torch.int8).numpy(), -shift.numpy()


def _chosen(choice: Tensor) -> Tensor:
    return (torch.sigmoid(choice) * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def _error(layer: _Layer, weight: Tensor) -> Tensor:
    few = [
        _run(layer, layer.inputs[start : start + _BATCH], weight) - layer.targets[start : start + _BATCH]
        for start in range(0, len(layer.inputs), _BATCH)
    ]
    return torch.cat(few)


def _can_run(node: onnx.NodeProto) -> bool:
    options = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    plain = options.get("auto_pad", b"NOTSET") == b"NOTSET" and not options.get("transA")
    return node.op_type != "ConvTranspose" and plain and options.get("alpha", 1.0) == options.get("beta", 1.0) == 1.0


def _run(layer: _Layer, inputs: Tensor, weight: Tensor) -> Tensor:
    """The node in torch, with float32 `weight`."""
    bias = None if layer.bias is None else torch.from_numpy(layer.bias)
    options = {item.name: helper.get_attribute_value(item) for item in layer.node.attribute}
    if layer.point.op in ("Gemm", "MatMul"):
        product = inputs @ (weight.T if options.get("transB") else weight)
        return product if bias is None else product + bias
    rank = weight.ndim - 2
    pads = options.get("pads") or [0] * (2 * rank)
    stride, dilation = options.get("strides") or [1] * rank, options.get("dilations") or [1] * rank
    padded = F.pad(inputs, [pad for axis in reversed(range(rank)) for pad in (pads[axis], pads[axis + rank])])
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    output: Tensor = convolve(padded, weight, bias, stride, 0, dilation, options.get("group", 1))
    return output


def _constant(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> NDArray[np.float32] | None:
    if len(node.input) < 3 or node.input[2] not in constants:
        return None
    return np.array(numpy_helper.to_array(constants[node.input[2]]))


def _spread(images: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.stack(spread(list(images), _IMAGES))
