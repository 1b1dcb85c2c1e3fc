"""Scan the raw bytes of an untrusted ONNX file before any parser reads it.

A parsed message takes up to a hundred times the memory of its bytes, and functions that call each
other expand to any number of nodes. The scan counts both at every level of the file: in the model,
its graphs, their subgraphs, functions and attributes. It needs no memory in proportion to the file,
and not the `onnx` package.

Source of the field numbers: onnx.proto of ONNX 1.19.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field

__all__ = ["MalformedError", "TooLargeError", "scan"]

_MAX_PARTS = 500_000
"""Maximum number of fields of all messages that have lists. Ten thousand nodes have half of that."""
_MAX_NODES = 100_000
"""Maximum number of nodes after every function call is replaced by the function's nodes."""
_MAX_FUNCTION_BYTES = 2**28
"""Maximum size of all functions after every call is replaced by the function's bytes."""
_MAX_CALL_DEPTH = 64
_MAX_LEVELS = 100
"""Protobuf's own limit for nested messages."""
_MAX_NAME_BYTES = 1000

_SCHEMA: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 11: "value", 12: "value", 13: "value", 14: "annotation", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 14: "type", 15: "type", 22: "sparse", 23: "sparse"
    },
    "tensor": {13: "external"},
    "sparse": {1: "tensor", 2: "tensor"},
    "value": {2: "type"},
    "type": {1: "tensor type", 4: "element", 5: "element", 8: "tensor type", 9: "element"},
    "element": {1: "type", 2: "type"},
    "tensor type": {2: "shape"},
    "shape": {},
    "function": {7: "node", 11: "attribute", 12: "value"},
    "annotation": {},
    "external": {},
}  # fmt: skip
"""Message → field number → message in that field. Messages without lists, such as an entry of the
metadata, count as one field."""

_NAMES = {"node": (7, 4, 8), "function": (10, 1, 13)}
"""Field numbers of domain, operator or function, and overload."""

_Function = tuple[bytes, ...]
"""Domain, name and overload."""


class MalformedError(Exception):
    """The bytes are not a protobuf message."""


class TooLargeError(Exception):
    """The file has more parts than any classifier."""


@dataclass(slots=True)
class _Body:
    """The nodes of the main graph, or of a function; nodes of subgraphs included."""

    calls: dict[_Function, int] = field(default_factory=dict)
    nodes: int = 0
    bytes: int = 0


def scan(content: mmap.mmap) -> set[str]:
    """Check the size of a model, and return the locations of its external weights.

    Raises:
        MalformedError: the bytes are not a protobuf message.
        TooLargeError: there are too many nodes or other parts.
    """
    scanner = _Scanner(content)
    scanner.walk("model", 0, len(content), scanner.main, 0)
    scanner.check_functions()
    return scanner.locations


class _Scanner:
    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._parts = 0
        self.main = _Body()
        self._functions: dict[_Function, _Body] = {}
        self.locations: set[str] = set()

    def walk(self, kind: str, start: int, end: int, body: _Body, level: int) -> None:
        """Count the fields of a message, and of the messages in it."""
        if level > _MAX_LEVELS:
            raise MalformedError(f"messages are nested more than {_MAX_LEVELS} levels deep")
        if kind == "function":
            body = _Body(bytes=end - start)
        children, named = _SCHEMA[kind], _NAMES.get(kind, (1, 2) if kind == "external" else ())
        names: dict[int, bytes] = {}
        position = start
        while position < end:
            number, first, position = _field(self._content, position, end)
            self._parts += 1
            if self._parts > _MAX_PARTS:
                raise TooLargeError(f"more than {_MAX_PARTS:,} parts")
            if number in named:
                name = bytes(self._content[first : min(position, first + _MAX_NAME_BYTES)])
                names[number] = b"" if name == b"ai.onnx" else name
            child = children.get(number)
            if child is None:
                continue
            if child == "node":
                body.nodes += 1
                if body.nodes > _MAX_NODES:
                    raise TooLargeError(f"more than {_MAX_NODES:,} nodes")
            self.walk(child, first, position, body, level + 1)
        self._add(kind, tuple(names.get(number, b"") for number in named), body)

    def _add(self, kind: str, names: tuple[bytes, ...], body: _Body) -> None:
        if kind == "node":
            body.calls[names] = body.calls.get(names, 0) + 1
        elif kind == "function":
            same_name = self._functions.setdefault(names, body)
            if same_name is not body:  # invalid; readers differ in which one they use
                same_name.nodes += body.nodes
                same_name.bytes += body.bytes
                for called, count in body.calls.items():
                    same_name.calls[called] = same_name.calls.get(called, 0) + count
        elif kind == "external" and names[0] == b"location":
            try:
                self.locations.add(names[1].decode())
            except UnicodeDecodeError as error:
                raise MalformedError(f"the location of external weights is not text: {names[1]!r}") from error

    def check_functions(self) -> None:
        """Count nodes and bytes as if every call were replaced by the function.

        Raises:
            TooLargeError: the result is too large, or a function calls itself.
        """
        known: dict[_Function, tuple[int, int]] = {}

        def expanded(body: _Body, callers: tuple[_Function, ...]) -> tuple[int, int]:
            nodes, size = body.nodes, body.bytes
            for called, count in body.calls.items():
                if called not in self._functions:
                    continue  # an operator
                if len(callers) >= _MAX_CALL_DEPTH or called in callers:
                    raise TooLargeError(f"functions that call each other more than {_MAX_CALL_DEPTH} levels deep")
                if called not in known:
                    known[called] = expanded(self._functions[called], (*callers, called))
                nodes += count * known[called][0]
                size += count * known[called][1]
                if nodes > _MAX_NODES or size > _MAX_FUNCTION_BYTES:
                    raise TooLargeError(f"more than {_MAX_NODES:,} nodes once its functions are expanded")
            return nodes, size

        expanded(self.main, ())


def _field(content: mmap.mmap, position: int, end: int) -> tuple[int, int, int]:
    """Return a field's number, and the start and end of its content."""
    tag = content[position]
    first = position + 1
    if tag > 127:
        tag, first = _varint(content, position, end)
    number, wire_type = tag >> 3, tag & 7
    if wire_type == 0:
        return number, first, _varint(content, first, end)[1]
    if wire_type == 2:
        length, first = _varint(content, first, end)
    elif wire_type in (1, 5):
        length = 8 if wire_type == 1 else 4
    else:
        raise MalformedError(f"byte {position} does not start a protobuf field")
    if number == 0 or first + length > end:
        raise MalformedError(f"the field at byte {first} declares {length:,} bytes, but only {end - first:,} are left")
    return number, first, first + length


def _varint(content: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    """Return the variable-length integer at `position`, and the position behind it."""
    value, start = 0, position
    for shift in range(0, 70, 7):
        if position >= end:
            raise MalformedError("it ends inside a number")
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise MalformedError(f"the number at byte {start} is too long")
