"""Write configurations in protobuf's text format, which Triton reads as `config.pbtxt`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["Enum", "Map", "to_pbtxt"]


class Enum(str):
    """The name of an enum value, which is written without quotes."""

    __slots__ = ()


class Map(dict[str, Any]):
    """A map field, which is written as entries with `key` and `value`."""


def to_pbtxt(message: Mapping[str, Any]) -> str:
    """Return a message in protobuf's text format.

    Args:
        message: field name → a number, a bool, text, an `Enum`, a message (a mapping), a `Map`, or a
            list of these. Fields with None or an empty list are omitted.
    """
    return "".join(f"{line}\n" for line in _lines(message))


def _lines(message: Mapping[str, Any]) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, Map):
            yield from (line for key, one in value.items() for line in _field(name, {"key": key, "value": one}))
        elif isinstance(value, Sequence) and not isinstance(value, str):
            if value and not isinstance(value[0], Mapping):
                yield f"{name}: [ {', '.join(map(_scalar, value))} ]"
            else:
                yield from (line for one in value for line in _field(name, one))
        elif value is not None:
            yield from _field(name, value)


def _field(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield f"{name} {{"
        yield from (f"  {line}" for line in _lines(value))
        yield "}"
    else:
        yield f"{name}: {_scalar(value)}"


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Enum):
        return str(value)
    # JSON's escapes for control characters and quotes are valid in the text format; other
    # characters are written as UTF-8.
    return json.dumps(value, ensure_ascii=False)
