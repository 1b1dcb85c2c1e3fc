"""Every field of TrainConfig, with values below, at and beyond its range and of wrong types."""

import dataclasses
import math
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import tomli_w

from runtime.errors import ConfigError
from train.config import AttackConfig, DataConfig, OptimConfig, TrainConfig
from train.config_file import from_mapping, parse_setting, read_toml
from train.limits import limits_of, types_of
from train.recipes import RECIPES

SECTIONS: dict[str, type] = {"": TrainConfig, "attack": AttackConfig, "data": DataConfig, "optim": OptimConfig}
FIELDS = [
    (section, item.name)
    for section, kind in SECTIONS.items()
    for item in dataclasses.fields(kind)
    if item.name not in SECTIONS
]
HUGE = 10**400
NUMBERS = (-HUGE, -1, 0, 1, HUGE, -1e300, -0.5, 0.0, 1e-300, 0.5, 1e300, math.inf, -math.inf, math.nan)
OTHERS: tuple[Any, ...] = (
    "",
    "x",
    "a\x00b",
    "a\nb",
    "y" * 5000,
    "~no-such-user/x",
    "\udc80",
    True,
    [],
    [1],
    [0.5, 0.2],
    {},
    {"x": 1},
)


def numbers_around(section: str, name: str) -> tuple[list[float], list[float]]:
    """Return numbers within the range of a field, including its bounds, and numbers beyond it."""
    limits, whole = limits_of(SECTIONS[section])[name], int in types_of(SECTIONS[section])[name]
    inside: list[float] = []
    outside: list[float] = []
    for bound, direction, included in (
        (limits.at_least, -1, True),
        (limits.above, -1, False),
        (limits.at_most, 1, True),
        (limits.below, 1, False),
    ):
        if bound is None:
            continue
        beyond = bound + direction if whole else math.nextafter(bound, direction * math.inf)
        within = bound - direction if whole else math.nextafter(bound, -direction * math.inf)
        outside += [beyond, bound + 2 * direction] if included else [bound, beyond]
        inside += [bound, within] if included else [within]
    return [int(number) if whole else float(number) for number in inside], outside


def mapping(section: str, name: str, value: Any) -> dict[str, Any]:
    """Return the content of a TOML file that sets one field."""
    content: dict[str, Any] = {"arch": "resnet18"}
    return content | ({section: {name: value}} if section else {name: value})


def is_accepted(section: str, name: str, value: Any) -> bool:
    """Return whether a config accepts a value. An error other than ConfigError fails the test."""
    try:
        config = from_mapping(mapping(section, name, value))
    except ConfigError as error:
        assert name in str(error)
        assert "must be" in str(error) or "unknown recipe" in str(error)
        return False
    part = getattr(config, section) if section else config
    assert dataclasses.replace(part) == part
    return True


def by_setting(section: str, name: str, value: Any) -> bool:
    """Return whether `--set` accepts a value."""
    field = f"{section}.{name}" if section else name
    try:
        text = tomli_w.dumps({"value": value}).partition("=")[2].strip() if not isinstance(value, dict) else str(value)
    except (ValueError, UnicodeError):
        text = str(value)
    try:
        from_mapping({"arch": "resnet18"} | parse_setting(f"{field}={text}"))
    except ConfigError:
        return False
    return True


def expectation(section: str, name: str, value: Any) -> bool | None:
    """Return whether the type of a field accepts a value; None if the range decides."""
    kinds = types_of(SECTIONS[section])[name]
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int):
        return None if {int, float} & set(kinds) and abs(value) < HUGE else False
    if isinstance(value, float):
        return None if float in kinds and math.isfinite(value) else False
    if isinstance(value, str):
        broken = len(value) > 4096 or not value.isprintable()
        return None if {str, Path} & set(kinds) and not broken else False
    pairs = dict if isinstance(value, dict) else tuple
    return None if any(get_origin(kind) is pairs for kind in kinds) else False


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_only_config_errors_for_any_value(section: str, name: str) -> None:
    inside, outside = numbers_around(section, name)
    for value in (*NUMBERS, *OTHERS, *inside, *outside):
        accepted, expected = is_accepted(section, name, value), expectation(section, name, value)
        assert expected is None or accepted == expected, value
        by_setting(section, name, value)  # `--set` reads some texts as numbers


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_the_bounds_of_every_range(section: str, name: str, tmp_path: Path) -> None:
    kinds = types_of(SECTIONS[section])[name]
    inside, outside = numbers_around(section, name)
    if int in kinds or float in kinds:
        assert inside and outside, "a number needs a range"
    if any(get_origin(kind) is tuple for kind in kinds):
        inside, outside = [], []
        (pair,) = (kind for kind in kinds if get_origin(kind) is tuple)
        assert len(get_args(pair)) == 2
    for value in inside:
        assert is_accepted(section, name, value), value
        assert by_setting(section, name, value), value
        (tmp_path / "c.toml").write_text(
            tomli_w.dumps({"arch": "a"} | ({section: {name: value}} if section else {name: value}))
        )
        from_mapping(read_toml(tmp_path / "c.toml"))
    for value in outside:
        assert not is_accepted(section, name, value), value
        assert not by_setting(section, name, value), value


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_every_choice_is_accepted(section: str, name: str) -> None:
    limits, item = limits_of(SECTIONS[section])[name], SECTIONS[section].__dataclass_fields__[name]  # type: ignore[attr-defined]
    for choice in (*limits.one_of, *(RECIPES if name == "recipe" else ())):
        assert is_accepted(section, name, choice)
    if item.default not in (dataclasses.MISSING, None):
        assert is_accepted(section, name, item.default)


@pytest.mark.parametrize(
    ("setting", "accepted"),
    [
        ("data.crop_scale=[0.08, 1.0]", True),
        ("data.crop_scale=[1, 1]", True),
        ("data.crop_scale=[0.5]", False),
        ("data.crop_scale=[2.0, 3.0]", False),
        ("data.crop_scale=[0.0, 1.0]", False),
        ("data.crop_scale=[1.0, 0.5]", False),
        ("data.crop_scale=['a', 'b']", False),
        ("data.crop_scale=[true, true]", False),
        ("optim.options.betas=[0.9, 0.99]", True),
        ("optim.options.nesterov=true", True),
        ("optim.options.eps=nan", False),
        ("optim.options.eps=1979-05-27", False),
        ("optim.options={a = {b = 1}}", False),
        ("optim=0x" + "f" * 5000, False),
        ("optim.lr=0x" + "f" * 5000, False),
        ("seed=" + "9" * 5000, False),
        ("data.crop_scale=" + "[" * 2000, False),
        ("epochs=3\nseed=4", False),
    ],
)
def test_settings_that_are_not_single_numbers(setting: str, accepted: bool) -> None:
    try:
        from_mapping({"arch": "resnet18"} | parse_setting(setting))
    except ConfigError as error:
        assert not accepted, error
    else:
        assert accepted


@pytest.mark.parametrize("content", ["seed = " + "9" * 5000, "a = " + "[" * 5000, 'arch = "\udc80"', "arch = 3"])
def test_toml_files_with_broken_values(tmp_path: Path, content: str) -> None:
    (tmp_path / "c.toml").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError):
        from_mapping(read_toml(tmp_path / "c.toml"))


def test_a_message_states_the_range_the_value_and_the_default() -> None:
    expected = (
        "optim.clip_grad must be a finite number of at least 0; found -1.0; remove the setting to use the default"
    )
    with pytest.raises(ConfigError, match=expected):
        OptimConfig(clip_grad=-1.0)
