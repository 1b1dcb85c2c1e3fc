"""Cut a graph into segments that run one after the other, each up to the next normalized tensor.

All images pass one segment before any image enters the next, so a tensor can be normalized with its
statistics over all images. Only the tensors between two segments are held in memory.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import onnx

__all__ = ["Segment", "cut", "largest_bytes", "tensor_sizes"]

_RECOMPUTE_BYTES = 2**20
"""Tensors of at least this size per image are computed again in the next segment instead of being
held, if what they are computed from is less than half as large. That is faster than memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The nodes up to a normalized tensor."""

    nodes: tuple[onnx.NodeProto, ...]
    """Nodes, in the order of computation."""
    inputs: tuple[str, ...]
    """Tensors of earlier segments, and the graph's input, that it reads."""
    outputs: tuple[str, ...]
    """Tensors that are held for later segments; for the last segment, the graph's output."""
    normalized: tuple[str, ...]
    """The normalized tensors of earlier segments that it scales and shifts: an input as it was
    measured, or a tensor that is computed again."""
    end: str
    """The normalized tensor that it ends with; "" for the last segment."""
    dropped: frozenset[str]
    """Inputs that no later segment reads as they are."""


def cut(graph: onnx.GraphProto, normalized: Collection[str], source: str, sizes: Mapping[str, int]) -> list[Segment]:
    """Cut a graph behind the nodes that compute the tensors `normalized`.

    Args:
        graph: nodes are in the order of computation.
        normalized: tensors that nodes of the graph compute.
        source: name of the graph's input.
        sizes: bytes of each tensor for one image; tensors of unknown size count as small.
    """
    groups, ends = _groups(graph, normalized)
    last_read = _last_reads(groups, ends, graph.output[0].name)
    segments: list[Segment] = []
    live = {source}
    again: list[onnx.NodeProto] = []  # nodes of the previous segment, whose outputs are not held
    scaled: list[str] = []
    for place, nodes in enumerate(groups):
        begin, end = ends[place - 1] if place else "", ends[place] if place < len(ends) else ""
        nodes = [*again, *nodes]
        scaled = [*scaled, begin] if begin else []
        read = dict.fromkeys([*scaled, *(name for node in nodes for name in node.input)])
        outputs = [name for node in nodes for name in node.output if last_read.get(name, -1) > place]
        raw = [name for name in scaled if name in live]  # held as measured; from here on as scaled
        outputs += [name for name in raw if last_read[name] > place]
        dropped = {name for name in live if name in raw or last_read.get(name, -1) <= place}
        held, freed = (sum(sizes.get(name, 0) for name in names) for names in (outputs, dropped))
        is_held = not end or bool(again) or held < _RECOMPUTE_BYTES or held < 2 * freed
        segments.append(
            Segment(
                nodes=tuple(nodes),
                inputs=tuple(name for name in read if name in live),
                outputs=tuple(outputs) if is_held else (),
                normalized=tuple(scaled),
                end=end,
                dropped=frozenset(dropped if is_held else ()),
            )
        )
        if is_held:
            live = (live - dropped) | set(outputs)
            again, scaled = [], []
        else:
            again = nodes
    return segments


def largest_bytes(segments: Iterable[Segment], source: str, sizes: Mapping[str, int]) -> int:
    """Return the size of the largest set of tensors that is held for one image."""
    live = {source}
    largest = 0
    for segment in segments:
        live = (live - segment.dropped) | set(segment.outputs)
        largest = max(largest, sum(sizes.get(name, 0) for name in live))
    return largest


def tensor_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the bytes of float32 tensors; 0 for those with open sizes."""
    return {name: max(0, 4 * math.prod(shape)) for name, shape in shapes.items()}


def _groups(graph: onnx.GraphProto, normalized: Collection[str]) -> tuple[list[list[onnx.NodeProto]], list[str]]:
    """Return the nodes up to each normalized tensor, those behind the last one, and the tensors."""
    groups: list[list[onnx.NodeProto]] = [[]]
    ends = []
    for node in graph.node:
        groups[-1].append(node)
        found = next((name for name in node.output if name in normalized), "")
        if found:
            ends.append(found)
            groups.append([])
    return groups, ends


def _last_reads(groups: list[list[onnx.NodeProto]], ends: list[str], result: str) -> dict[str, int]:
    """Return the last group that reads each tensor; the graph's output is read behind all groups."""
    last: dict[str, int] = {}
    for place, nodes in enumerate(groups):
        last.update((name, place) for node in nodes for name in node.input)
    for place, end in enumerate(ends):  # the next group scales it
        last[end] = max(last.get(end, 0), place + 1)
    return last | {result: len(groups)}
