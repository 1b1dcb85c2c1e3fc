"""A first look at the bytes of an ONNX file, before protobuf makes objects of them."""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import ModelFileError

__all__ = ["check_bytes"]

_MOST_BYTES = 2**31 - 1
"""What protobuf reads; larger models have their weights beside the file."""
_MOST_NODES = 100_000
_MOST_CHILDREN = 1_000_000
"""Nodes, weights, inputs and shapes of a graph."""

_GRAPH, _NODE = 7, 1  # fields of ModelProto and of GraphProto


def check_bytes(path: Path) -> None:
    """Counts the parts of the graph in the file's own bytes, since a part of two bytes takes a hundred once it is read.

    Raises:
        ModelFileError: empty, beyond what protobuf reads, cut short, or of too many parts.
    """
    size = path.stat().st_size
    if size == 0:
        raise ModelFileError(f"{path} is not an ONNX file: it is empty")
    if size > _MOST_BYTES:
        raise ModelFileError(
            f"{path} has {size / 1e9:.1f} GB; an ONNX file has at most 2 GB, with larger weights in a file beside it"
        )
    counts: Counter[int] = Counter()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            for number, start, end in _fields(content, 0, size):
                if number == _GRAPH:
                    for child, _, _ in _fields(content, start, end):
                        counts[child] += 1
                        if counts[_NODE] > _MOST_NODES or counts.total() > _MOST_CHILDREN:
                            raise ModelFileError(
                                f"{path} has more than {_MOST_NODES:,} nodes or {_MOST_CHILDREN:,} parts; "
                                "no classifier has; refused"
                            )
        except (IndexError, _CutError) as error:
            raise ModelFileError(f"{path} is not an ONNX file, or is truncated: {error}") from error


class _CutError(Exception):
    """Bytes that are no protobuf message."""


def _fields(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields number, start and end of each field with a length in a message; others are passed over."""
    place = start
    while place < end:
        tag, place = _varint(content, place, end)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            _, place = _varint(content, place, end)
            continue
        if kind == 2:
            length, place = _varint(content, place, end)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise _CutError(f"byte {place - 1} begins nothing that protobuf knows")
        if number == 0 or place + length > end:
            raise _CutError(f"at byte {place} a part of {length:,} bytes begins, {end - place:,} are left")
        if kind == 2:
            yield number, place, place + length
        place += length


def _varint(content: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= end:
            raise _CutError("it ends within a number")
        byte = content[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise _CutError(f"at byte {place} a number is too long")
