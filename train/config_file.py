"""Convert a TrainConfig from TOML and `--set section.field=value`, and back to TOML.

    arch = "resnet50"
    recipe = "advprop"

    [attack]
    epsilon = 4.0

Field names are those in `train.config`; the sections are `attack`, `data` and `optim`.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from runtime.errors import ConfigError, nearest
from train.config import TrainConfig

__all__ = ["flatten", "from_mapping", "merge", "parse_setting", "read_toml", "to_mapping", "to_toml"]

_Config = TypeVar("_Config")


def read_toml(path: Path) -> dict[str, Any]:
    """Read a configuration file as nested dicts.

    Raises:
        ConfigError: the file is missing or is not TOML; the message includes the line number.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read --config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not TOML: {error}") from error


def parse_setting(text: str) -> dict[str, Any]:
    """Parse `optim.lr=1e-3` as {"optim": {"lr": 0.001}}; a value that is not TOML is a string.

    Raises:
        ConfigError: there is no `=`.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"--set takes FIELD=VALUE, e.g. optim.weight_decay=1e-5; found {text!r}")
    try:
        parsed: Any = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    for part in reversed(name.strip().split(".")):
        parsed = {part: parsed}
    result: dict[str, Any] = parsed
    return result


def merge(base: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested dicts; later values replace earlier ones."""
    merged = dict(base)
    for other in others:
        for key, value in other.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = merge(merged[key], value) if both else value
    return merged


def from_mapping(content: Mapping[str, Any]) -> TrainConfig:
    """Build a TrainConfig from nested dicts.

    Raises:
        ConfigError: a field is unknown (the message suggests the nearest), a value has the wrong
            type, or `arch` is missing.
    """
    if "arch" not in content:
        raise ConfigError(
            'the architecture is missing: pass --arch NAME, or set arch = "NAME" in the configuration file'
        )
    return _build(TrainConfig, content, "")


def _build(kind: type[_Config], content: Mapping[str, Any], prefix: str) -> _Config:
    hints = typing.get_type_hints(kind, localns={"Recipe": Any})
    values = {}
    for key, value in content.items():
        if key not in hints:
            raise ConfigError(f"unknown setting {prefix}{key}; {nearest(key, hints)}".rstrip("; "))
        values[key] = _convert(hints[key], value, prefix + key)
    return kind(**values)


def _convert(kind: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} is a section: set {name}.FIELD; found {value!r}")
        return _build(typing.cast(type, kind), value, f"{name}.")
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        if option is type(None):
            if value is None:
                return None
        elif option is float and _is_number(value):
            return float(value)
        elif option is Path and isinstance(value, str | Path):
            return Path(value).expanduser()
        elif typing.get_origin(option) is tuple and isinstance(value, list | tuple) and all(map(_is_number, value)):
            return tuple(float(item) for item in value)
        elif typing.get_origin(option) is dict and isinstance(value, Mapping):
            return dict(value)
        elif option in (int, str, bool) and type(value) is option:
            return value
    expected = " or ".join(getattr(option, "__name__", str(option)) for option in options if option is not type(None))
    raise ConfigError(f"{name} must be {expected}; found {value!r}")


def _is_number(value: object) -> bool:
    """Return whether a value is a number that float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and (value != value or abs(value) < 2**1023)


def to_mapping(config: Any) -> dict[str, Any]:
    """Return a config as nested dicts of TOML types, without the fields that are None."""
    result: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            result[item.name] = to_mapping(value)
        elif value is not None:
            result[item.name] = str(value) if isinstance(value, Path) else value
    return result


def to_toml(config: TrainConfig) -> str:
    """Return a config as TOML that `--config` reads back to an equal one."""
    import tomli_w  # not needed to parse command lines

    return tomli_w.dumps(to_mapping(config))


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts: {"optim": {"lr": 1}} → {"optim.lr": 1}."""
    result: dict[str, Any] = {}
    for key, value in content.items():
        result |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return result
