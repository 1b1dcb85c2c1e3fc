"""Types and ranges of configuration fields: declared next to each field, checked in one place."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from runtime.errors import ConfigError

__all__ = ["Limits", "check_fields", "limits_of", "setting", "shown", "types_of"]

_KEY = "limits"
_MAX_TEXT = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The values that a field accepts, in addition to its type. Numbers must always be finite."""

    at_least: float | None = None
    """Smallest value."""
    above: float | None = None
    """Lower bound that is not itself accepted."""
    at_most: float | None = None
    """Largest value."""
    below: float | None = None
    """Upper bound that is not itself accepted."""
    one_of: tuple[str, ...] = ()
    """The accepted texts; empty for any text."""
    unit: str = ""
    """Unit of the value, for messages."""

    def accept(self, number: float) -> bool:
        """Return whether a number is finite and within the bounds."""
        try:
            finite = math.isfinite(number)
        except OverflowError:  # an integer with hundreds of digits
            return False
        return (
            finite
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            text = f"from {self.at_least} to {self.at_most}"
        else:
            bounds = {
                "of at least": self.at_least,
                "above": self.above,
                "at most": self.at_most,
                "below": self.below,
            }
            text = " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)
        return f"{text}, in {self.unit}" if self.unit else text


def setting(default: Any = MISSING, **limits: Any) -> Any:
    """Return a dataclass field with a default and the given `Limits`."""
    return dataclasses.field(default=default, metadata={_KEY: Limits(**limits)})


def types_of(kind: Any) -> dict[str, tuple[Any, ...]]:
    """Return the types that each field of a dataclass accepts; `int | None` is two types."""
    hints = typing.get_type_hints(kind)
    return {
        item.name: typing.get_args(hint) if isinstance(hint := hints[item.name], types.UnionType) else (hint,)
        for item in dataclasses.fields(kind)
    }


def limits_of(kind: type) -> dict[str, Limits]:
    """Return the limits of each field of a dataclass."""
    return {item.name: item.metadata.get(_KEY, Limits()) for item in dataclasses.fields(kind)}


def check_fields(config: Any, section: str = "") -> None:
    """Check the type and the range of every field of a dataclass.

    Args:
        config: the dataclass instance.
        section: its section in a configuration file, for messages.

    Raises:
        ConfigError: a value has the wrong type or is out of range; the message states the expected
            values.
    """
    kind = type(config)
    limits, types_of_fields = limits_of(kind), types_of(kind)
    for item in dataclasses.fields(kind):
        value, allowed = getattr(config, item.name), types_of_fields[item.name]
        empty = item.default == ""
        if any(_fits(value, option, limits[item.name], empty) for option in allowed):
            continue
        option = next(option for option in allowed if option is not type(None))
        default = None if item.default is MISSING else item.default
        raise ConfigError(
            f"{f'{section}.' if section else ''}{item.name} must be {_describe(option, limits[item.name])}; "
            f"found {shown(value)}",
            fix=f"remove the setting to use the default{'' if default in (None, '') else f', {default}'}",
        )


def _fits(value: Any, kind: Any, limits: Limits, empty: bool) -> bool:
    """Return whether a value has one of the field types and is within its limits."""
    if kind is bool or dataclasses.is_dataclass(kind) or kind is type(None):
        return isinstance(value, kind)  # type: ignore[arg-type]
    if kind is int:
        return _is_whole(value) and limits.accept(value)
    if kind is float:
        return _is_number(value) and limits.accept(value)
    if kind is str:
        return _is_text(value) and bool(value or empty) and (not limits.one_of or value in limits.one_of)
    if kind is Path:
        return isinstance(value, Path) and _is_text(str(value))
    if typing.get_origin(kind) is tuple:  # a range
        in_range = isinstance(value, tuple) and all(_is_number(item) and limits.accept(item) for item in value)
        return in_range and len(value) == len(typing.get_args(kind)) and list(value) == sorted(value)
    assert typing.get_origin(kind) is dict, kind
    return isinstance(value, dict) and all(_is_text(key) and _is_plain(item) for key, item in value.items())


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    """Return whether a value is text that can be a file name and can be written as UTF-8."""
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # bytes on the command line that are not UTF-8
        return False
    return not any(ord(character) < 32 or ord(character) == 127 for character in value)


def _is_plain(value: object) -> bool:
    """Return whether a value is an argument of an optimizer."""
    if isinstance(value, list | tuple):
        return all(_is_number(item) and Limits().accept(item) for item in value)
    return isinstance(value, bool) or _is_text(value) or (_is_number(value) and Limits().accept(value))  # type: ignore[arg-type]


def _describe(kind: Any, limits: Limits) -> str:
    if dataclasses.is_dataclass(kind):
        return "a section of settings"
    if limits.one_of:
        *others, last = limits.one_of
        return f"{', '.join(others)} or {last}"
    if typing.get_origin(kind) is tuple:
        return f"two numbers {limits}, the smaller one first"
    if typing.get_origin(kind) is dict:
        return "a table of finite numbers, texts, or lists of numbers"
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a finite number",
        str: "a text (not empty, no control characters)",
        Path: "a path (not empty, no control characters)",
    }
    return f"{names[kind]} {limits}".rstrip()


def shown(value: object) -> str:
    """Return a value for a message."""
    try:
        return repr(value)[:80]
    except ValueError:  # an integer with thousands of digits
        return f"a {type(value).__name__} with thousands of digits"
