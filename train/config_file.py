"""Convert a TrainConfig from TOML and `--set section.field=value`, and back to TOML.

    arch = "resnet50"
    recipe = "advprop"

    [attack]
    epsilon = 4.0

Field names are those in `train.config`; the sections are `attack`, `data` and `optim`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from runtime.errors import ConfigError
from train.config import TrainConfig
from train.limits import shown, types_of

__all__ = ["flatten", "from_mapping", "merge", "parse_setting", "read_toml", "to_mapping", "to_toml"]

_Config = TypeVar("_Config")

_OTHER_NAMES = {
    "weights": "init_checkpoint (--weights FILE)",
    "model": "arch (--arch NAME)",
    "imgsz": "data.img_size (--img-size PIXELS)",
    "learning_rate": "optim.lr",
    "lr0": "optim.lr",
    "opt": "optim.optimizer",
    "sched": "optim.schedule",
    "smoothing": "optim.label_smoothing",
    "aa": "data.auto_augment",
}
"""Names in other tools → ours."""


def read_toml(path: Path) -> dict[str, Any]:
    """Read a configuration file as nested dicts.

    Raises:
        ConfigError: the file is missing or is not TOML; the message includes the line number.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read --config {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise ConfigError(f"--config {path} is not TOML: {error}") from error


def parse_setting(text: str) -> dict[str, Any]:
    """Parse `optim.lr=1e-3` as {"optim": {"lr": 0.001}}; a value that is not TOML is a string.

    Raises:
        ConfigError: there is no `=`.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"--set takes FIELD=VALUE, e.g. optim.weight_decay=1e-5; found {text!r}")
    parsed: Any = value.strip()
    with contextlib.suppress(ValueError, RecursionError):
        content = tomllib.loads(f"value = {value}")
        parsed = content["value"] if len(content) == 1 else parsed
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
            type or is out of range, or `arch` is missing.
    """
    if "arch" not in content:
        raise ConfigError(
            'the architecture is missing: pass --arch NAME, or set arch = "NAME" in the configuration file'
        )
    return _build(TrainConfig, content, "")


def _build(kind: type[_Config], content: Mapping[str, Any], prefix: str) -> _Config:
    known = types_of(kind)
    values = {}
    for key, value in content.items():
        if key not in known:
            raise ConfigError(f"unknown setting {prefix}{key}", fix=_nearest_setting(prefix, key))
        values[key] = _convert(known[key], value, prefix + key)
    return kind(**values)


def _nearest_setting(prefix: str, key: str) -> str:
    """Return advice about an unknown field: the same field of another section, or similar names."""
    names = [f"{section}.{name}" if section else name for section, fields in _fields().items() for name in fields]
    same = [name for name in names if name.rpartition(".")[2] == key.replace("-", "_")]
    if same:
        return f"use {' or '.join(same)}"
    if key in _OTHER_NAMES:
        return f"use {_OTHER_NAMES[key]}"
    here = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == prefix.rstrip(".")}
    for candidates in (here, {name.rpartition(".")[2]: name for name in names}):
        if close := difflib.get_close_matches(key, candidates, n=3, cutoff=0.6):
            return f"did you mean {' or '.join(candidates[name] for name in close)}?"
    return "TrainConfig in train/config.py lists the settings"


def _fields() -> dict[str, list[str]]:
    """Return the names of the fields by section; the section of a field of TrainConfig is ""."""
    found: dict[str, list[str]] = {"": []}
    for name, kinds in types_of(TrainConfig).items():
        sections = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        if sections:
            found[name] = list(types_of(typing.cast(type, sections[0])))
        else:
            found[""].append(name)
    return found


def _convert(kinds: Sequence[Any], value: Any, name: str) -> Any:
    """Convert a TOML value to the type of its field, if possible; the config checks the result."""
    for kind in kinds:
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{name} is a section: set {name}.FIELD; found {shown(value)}")
            return _build(typing.cast(type, kind), value, f"{name}.")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return _as_float(value)
        if kind is Path and isinstance(value, str | Path):
            return _as_path(value)
        if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
            return tuple(_convert((float,), item, name) for item in value)
        if typing.get_origin(kind) is dict and isinstance(value, Mapping):
            return dict(value)
    return value


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return value


def _as_path(value: str | Path) -> str | Path:
    """Return a path; leave an empty text and `~` of an unknown user as text, which is not valid."""
    try:
        return Path(value).expanduser() if str(value) else value
    except RuntimeError:
        return value


def _is_number(value: object) -> bool:
    """Return whether a value is a number that float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and (value != value or abs(value) < 2**1023)


def to_mapping(config: Any) -> dict[str, Any]:
    """Return a config as nested dicts of TOML types, without the fields that are None.

    Paths become absolute, so `config.toml` repeats a run from any folder.
    """
    result: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            result[item.name] = to_mapping(value)
        elif value is not None:
            result[item.name] = str(value.absolute()) if isinstance(value, Path) else value
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
