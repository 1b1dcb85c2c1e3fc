"""Run the segments of a graph in ONNX Runtime.

Shape suffixes: N images, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from runtime.adapt.segments import Segment, cut, largest_bytes, tensor_sizes
from runtime.graph.model import session_of, tensor_types
from runtime.graph.shapes import infer
from runtime.graph.structure import graph_inputs, initializers_of, shape_of, unused_prefix

__all__ = ["Affine", "SegmentSession", "SegmentedGraph", "Tensors", "fixed_batch_size", "per_image"]

_PREFIX = "advprop_adapt/"

Tensors: TypeAlias = dict[str, NDArray[Any]]
"""Tensors of some images, by name."""

Affine: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Factor and shift of each channel of a tensor, (channels,)."""


class SegmentedGraph:
    """A float32 graph with one input and one output, cut at its normalized tensors."""

    def __init__(
        self, model: onnx.ModelProto, normalized: Collection[str], size: tuple[int, int], threads: int = 0
    ) -> None:
        """Cut `model` behind the nodes that compute the tensors `normalized`.

        Args:
            model: the graph; nodes are in the order of computation.
            normalized: tensors that nodes of the graph compute.
            size: height and width of the images.
            threads: CPU threads; 0 uses all cores.
        """
        self._model = model
        self._threads = threads
        self._buffers = _Buffers()
        self._types = tensor_types(model)
        self._weights = initializers_of(model.graph)
        self._prefix = unused_prefix(model.graph, _PREFIX)
        self.input = graph_inputs(model.graph)[0].name
        self.batch_size = fixed_batch_size(model) or 2
        """Images per call: few, whose tensors stay in the CPU caches."""
        self.output = model.graph.output[0].name
        sizes = tensor_sizes(infer(model, 1, size).shapes)
        self.segments = cut(model.graph, normalized, self.input, sizes)
        self.bytes_per_image = largest_bytes(self.segments, self.input, sizes)
        """Memory of the tensors between two segments, for one image."""

    def open(self, segment: Segment, affines: Mapping[str, Affine]) -> SegmentSession:
        """Return a session of a segment.

        Args:
            segment: one of `segments`.
            affines: factor and shift of the tensors `segment.normalized`.
        """
        raw = {name: f"{self._prefix}{name}" for name in segment.normalized}
        weights: list[onnx.TensorProto] = []
        held = [name for name in segment.normalized if name in segment.inputs]
        nodes = [self._affine_node(name, raw[name], affines[name], weights) for name in held]
        for node in segment.nodes:
            scaled = [name for name in node.output if name in raw]
            nodes.append(_with_outputs(node, raw) if scaled else node)
            nodes += [self._affine_node(name, raw[name], affines[name], weights) for name in scaled]
        used = {name for node in nodes for name in node.input}
        weights += [tensor for name, tensor in self._weights.items() if name in used]
        fetched = dict.fromkeys([*segment.outputs, segment.end] if segment.end else segment.outputs)
        graph = helper.make_graph(
            nodes,
            "segment",
            [self._value(name, raw.get(name, name)) for name in segment.inputs],
            [self._value(name) for name in fetched],
            weights,
        )
        model = helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)
        return SegmentSession(self._open(model), segment, raw, self._buffers)

    def _affine_node(self, name: str, raw: str, affine: Affine, weights: list[onnx.TensorProto]) -> onnx.NodeProto:
        """Return a node that scales and shifts `raw` to `name`, and append its constants to `weights`.

        ONNX Runtime computes a BatchNormalization of constants in the blocked layout of its
        convolutions.
        """
        scale_C, shift_C = affine
        constants = {"scale": scale_C, "shift": shift_C, "mean": 0 * scale_C, "variance": 0 * scale_C + 1}
        weights += [
            numpy_helper.from_array(array_C.astype(np.float32), f"{raw}/{part}") for part, array_C in constants.items()
        ]
        return helper.make_node(
            "BatchNormalization", [raw, *(f"{raw}/{part}" for part in constants)], [name], epsilon=0.0
        )

    def _open(self, model: onnx.ModelProto) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        return session_of(model, options)

    def _value(self, name: str, new_name: str = "") -> onnx.ValueInfoProto:
        kind = onnx.TypeProto()
        kind.tensor_type.CopyFrom(self._types[name])
        return helper.make_value_info(new_name or name, kind)


class SegmentSession:
    """Runs one segment."""

    def __init__(self, session: Any, segment: Segment, raw: Mapping[str, str], buffers: _Buffers) -> None:
        self._session = session
        self._segment = segment
        self._raw = raw
        self._names = [value.name for value in session.get_outputs()]
        self._buffers = buffers
        self._shapes: dict[int, list[tuple[tuple[int, ...], np.dtype[Any]]]] = {}

    def run(self, tensors: Tensors, images: int) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Run the segment on some images.

        Args:
            tensors: the tensors between the previous segment and this one. They are replaced by the
                tensors between this segment and the next one.
            images: number of images.

        Returns:
            Mean and mean square of the channels of the normalized tensor for each image, (N, C);
            None for the last segment.
        """
        segment = self._segment
        found = dict(zip(self._names, self._outputs(tensors, images), strict=True))
        for name in segment.dropped:
            self._buffers.give(tensors.pop(name))
        tensors.update((name, found[name]) for name in segment.outputs)
        if not segment.end:
            return None
        moments = _image_moments(found[segment.end], images)
        if segment.end not in segment.outputs:
            self._buffers.give(found[segment.end])
        return moments

    def _outputs(self, tensors: Tensors, images: int) -> list[NDArray[Any]]:
        """Run the session; outputs of a known shape go into used buffers.

        New memory for each output would take longer than the computation.
        """
        feeds = {self._raw.get(name, name): tensors[name] for name in self._segment.inputs}
        if images not in self._shapes:
            found: list[NDArray[Any]] = self._session.run(self._names, feeds)
            self._shapes[images] = [(array.shape, array.dtype) for array in found]
            return found
        outputs = [self._buffers.take(*shape) for shape in self._shapes[images]]
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name, array in zip(self._names, outputs, strict=True):
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(binding)
        return outputs


class _Buffers:
    """Memory of tensors that are no longer needed, for others of at most their size."""

    def __init__(self) -> None:
        self._free: dict[int, list[NDArray[np.uint8]]] = {}
        """Size in bytes → buffers."""

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return an array with undefined content."""
        size = math.prod(shape) * dtype.itemsize
        fitting = (length for length, found in self._free.items() if found and size <= length <= 2 * size)
        length = min(fitting, default=0)
        buffer = self._free[length].pop() if length else np.empty(size, np.uint8)
        return buffer[:size].view(dtype).reshape(shape)

    def give(self, array: NDArray[Any]) -> None:
        """Take back an array that `take` returned; other arrays are ignored."""
        base = array.base
        if isinstance(base, np.ndarray) and base.dtype == np.uint8 and base.ndim == 1:
            self._free.setdefault(len(base), []).append(base)


def fixed_batch_size(model: onnx.ModelProto) -> int:
    """Return the batch size that a graph accepts; 0 if it accepts any."""
    return max(0, shape_of(graph_inputs(model.graph)[0].type.tensor_type)[0])


def per_image(values: NDArray[np.float32], images: int) -> NDArray[np.float32]:
    """Return (N, C) of (N, C, 1, …), or of rows that belong to images in turn."""
    rows = values.reshape(values.shape[0], -1)
    return rows if len(rows) == images or len(rows) % images else rows.reshape(images, -1, rows.shape[1]).mean(1)


def _image_moments(values: NDArray[np.float32], images: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean and mean square of the channels of each image, (N, C), of a tensor (N, C, …)."""
    rows = values.reshape(values.shape[0] * values.shape[1], -1)
    length = np.float32(rows.shape[1])
    # Products of one row each: three times as fast as mean() and einsum(), and small enough that BLAS
    # starts no threads, which would take longer than the computation.
    total, squares = (
        np.matmul(rows[:, None, :], other) for other in (np.ones((rows.shape[1], 1), np.float32), rows[:, :, None])
    )
    shape = values.shape[:2]
    return per_image((total / length).reshape(shape), images), per_image((squares / length).reshape(shape), images)


def _with_outputs(node: onnx.NodeProto, renamed: Mapping[str, str]) -> onnx.NodeProto:
    result = onnx.NodeProto()
    result.CopyFrom(node)
    result.output[:] = [renamed.get(name, name) for name in node.output]
    return result
