"""Cut a graph into segments that run one after the other, each up to the next normalized tensor.

All images pass one segment before any image enters the next, so a tensor can be normalized with its
statistics over all images. Only the tensors between two segments are held in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from runtime.graph.model import session_of, tensor_types
from runtime.graph.shapes import infer
from runtime.graph.structure import graph_inputs, initializers_of, unused_prefix

__all__ = ["Affine", "Segment", "SegmentSession", "SegmentedGraph", "Tensors"]

_PREFIX = "advprop_adapt/"

Tensors: TypeAlias = dict[str, NDArray[Any]]
"""Tensors of some images, by name."""

Affine: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Factor and shift of each channel of a tensor, (channels,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The nodes between two normalized tensors."""

    nodes: tuple[onnx.NodeProto, ...]
    """Nodes, in the order of computation."""
    inputs: tuple[str, ...]
    """Tensors of earlier segments, and the graph's input, that it reads."""
    outputs: tuple[str, ...]
    """Tensors that later segments read; for the last segment, the graph's output."""
    begin: str
    """The normalized tensor that the previous segment ends with; "" for the first segment."""
    end: str
    """The normalized tensor that it ends with; "" for the last segment."""
    dropped: frozenset[str]
    """Tensors of earlier segments that no later segment reads, and `begin` as it was."""


class SegmentedGraph:
    """A float32 graph with one input and one output, cut at its normalized tensors."""

    def __init__(self, model: onnx.ModelProto, normalized: Sequence[str], threads: int = 0) -> None:
        """Cut `model` behind the nodes that compute the tensors `normalized`.

        Args:
            model: the graph; nodes are in the order of computation.
            normalized: tensors that nodes of the graph compute.
            threads: CPU threads; 0 uses all cores.
        """
        self._model = model
        self._threads = threads
        self._buffers = _Buffers()
        self._types = tensor_types(model)
        self._weights = initializers_of(model.graph)
        self._prefix = unused_prefix(model.graph, _PREFIX)
        self.input = graph_inputs(model.graph)[0].name
        self.output = model.graph.output[0].name
        self.segments = _cut(model.graph, set(normalized), self.input, self.output)

    def bytes_per_image(self, size: tuple[int, int]) -> int:
        """Return the memory of the largest set of tensors between two segments, for one image.

        Args:
            size: height and width of the images.
        """
        shapes = infer(self._model, 1, size).shapes
        live = {self.input}
        largest = 0
        for segment in self.segments:
            live = (live - segment.dropped) | set(segment.outputs)
            largest = max(largest, sum(4 * math.prod(shapes.get(name, ())) for name in live))
        return largest

    def open(self, segment: Segment, affine: Affine | None) -> SegmentSession:
        """Return a session of a segment.

        Args:
            segment: one of `segments`.
            affine: factor and shift of the tensor `segment.begin`, which the session applies first.
        """
        nodes, constants = list(segment.nodes), dict[str, NDArray[np.float64]]()
        renamed = {}
        if segment.begin and affine is not None:
            scale_C, shift_C = affine
            constants = {"scale": scale_C, "shift": shift_C, "mean": 0 * scale_C, "variance": 0 * scale_C + 1}
            renamed = {segment.begin: self._prefix + "begin"}
            inputs = [renamed[segment.begin], *(self._prefix + name for name in constants)]
            # ONNX Runtime computes a BatchNormalization of constants in the blocked layout of its convolutions.
            nodes.insert(0, helper.make_node("BatchNormalization", inputs, [segment.begin], epsilon=0.0))
        outputs = [self._value(name) for name in segment.outputs]
        used = {name for node in nodes for name in node.input}
        weights = [tensor for name, tensor in self._weights.items() if name in used]
        weights += [
            numpy_helper.from_array(array.astype(np.float32), self._prefix + name) for name, array in constants.items()
        ]
        inputs = [self._value(name, renamed.get(name, name)) for name in segment.inputs]
        graph = helper.make_graph(nodes, "segment", inputs, outputs, weights)
        model = helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)
        return SegmentSession(self._open(model), segment, renamed, self._buffers)

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

    def __init__(self, session: Any, segment: Segment, renamed: Mapping[str, str], buffers: _Buffers) -> None:
        self._session = session
        self._segment = segment
        self._renamed = renamed
        self._buffers = buffers
        self._shapes: dict[int, list[tuple[tuple[int, ...], np.dtype[Any]]]] = {}

    def run(self, tensors: Tensors) -> NDArray[np.float32] | None:
        """Run the segment on some images.

        Args:
            tensors: the tensors between the previous segment and this one. They are replaced by the
                tensors between this segment and the next one.

        Returns:
            The normalized tensor, (N, C, …); None for the last segment.
        """
        segment = self._segment
        found = self._outputs({self._renamed.get(name, name): tensors[name] for name in segment.inputs})
        for name in segment.dropped:
            self._buffers.give(tensors.pop(name))
        tensors.update(zip(segment.outputs, found, strict=True))
        return tensors[segment.end] if segment.end else None

    def _outputs(self, feeds: Tensors) -> list[NDArray[Any]]:
        """Run the session; outputs of a known shape go into used buffers.

        New memory for each output would take longer than the computation.
        """
        images = len(next(iter(feeds.values())))
        if images not in self._shapes:
            found: list[NDArray[Any]] = self._session.run(self._segment.outputs, feeds)
            self._shapes[images] = [(array.shape, array.dtype) for array in found]
            return found
        outputs = [self._buffers.take(*shape) for shape in self._shapes[images]]
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name, array in zip(self._segment.outputs, outputs, strict=True):
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(binding)
        return outputs


class _Buffers:
    """Memory of tensors that are no longer needed, for others of at most their size."""

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return an array with undefined content."""
        size = math.prod(shape) * dtype.itemsize
        fitting = [buffer for buffer in self._free if size <= len(buffer) <= 2 * size]
        buffer = min(fitting, key=len, default=None)
        if buffer is None:
            buffer = np.empty(size, np.uint8)
        else:
            self._free = [other for other in self._free if other is not buffer]
        return buffer[:size].view(dtype).reshape(shape)

    def give(self, array: NDArray[Any]) -> None:
        """Take back an array that `take` returned; other arrays are ignored."""
        base = array.base
        if isinstance(base, np.ndarray) and base.dtype == np.uint8 and base.ndim == 1:
            self._free.append(base)


def _cut(graph: onnx.GraphProto, normalized: set[str], source: str, result: str) -> list[Segment]:
    groups: list[list[onnx.NodeProto]] = [[]]
    ends: list[str] = []
    for node in graph.node:
        groups[-1].append(node)
        end = next((name for name in node.output if name in normalized), "")
        if end:
            ends.append(end)
            groups.append([])
    last_read = {result: len(groups)}
    for place, nodes in enumerate(groups):
        for node in nodes:
            last_read.update((name, place) for name in node.input if name != result)
    for place, end in enumerate(ends):  # the next segment changes it, if anything reads it
        last_read[end] = max(last_read.get(end, 0), place + 1)
    segments, live = [], {source}
    for place, nodes in enumerate(groups):
        begin, end = ends[place - 1] if place else "", ends[place] if place < len(ends) else ""
        read = dict.fromkeys([begin] if begin else []) | dict.fromkeys(name for node in nodes for name in node.input)
        made = [name for node in nodes for name in node.output if name]
        outputs = [name for name in made if last_read.get(name, -1) > place]
        if begin in last_read and last_read[begin] > place:  # as changed by this segment
            outputs.append(begin)
        dropped = {name for name in live if name == begin or last_read.get(name, -1) <= place}
        segments.append(
            Segment(
                nodes=tuple(nodes),
                inputs=tuple(name for name in read if name in live),
                outputs=tuple(outputs),
                begin=begin,
                end=end,
                dropped=frozenset(dropped),
            )
        )
        live = (live - dropped) | set(outputs)
    return segments
