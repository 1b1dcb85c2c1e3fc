import json
from typing import Any

import pytest

from runtime.errors import ConfigError, SpecError
from runtime.spec import ImageSizes, ModelSpec, Preprocessing

PREPROCESSING: dict[str, Any] = {
    "height": 224,
    "width": 160,
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.2, 0.2),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
}


def spec(**changes: Any) -> ModelSpec:
    fields: dict[str, Any] = {"arch": "resnet18", "classes": ("Katze", "犬")}
    return ModelSpec(**{**fields, "preprocessing": Preprocessing(**PREPROCESSING), **changes})


def test_json_round_trip_is_exact_and_stable() -> None:
    first = spec(wnids=("n1", "n2"), recipe="advprop", checkpoint_sha256="ab")
    text = first.to_json()
    assert ModelSpec.from_json(text) == first
    assert ModelSpec.from_json(text).to_json() == text
    assert json.loads(text)["schema"] == "advprop.spec/1"


def test_a_spec_without_an_exif_rule_ignores_the_orientation_as_before() -> None:
    assert ModelSpec.from_json(spec().to_json()).preprocessing.exif == "ignore"
    assert "exif" not in spec().to_json()
    upright = spec(preprocessing=Preprocessing(**PREPROCESSING, exif="upright"))
    assert ModelSpec.from_json(upright.to_json()) == upright


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("height", 0, "from 1 to 8192"),
        ("height", 32.5, "height .*found 32.5, expected a whole number"),
        ("width", True, "found True, expected a whole number"),
        ("width", "9", "found '9'"),
        ("mean", (0.5, 0.5), "three numbers"),
        ("mean", (0.5, 0.5, float("nan")), "three numbers"),
        ("mean", (0.5, 0.5, 10**400), "three numbers"),
        ("mean", "abc", "three numbers"),
        ("std", (0.0, 0.2, 0.2), "std .*three numbers from 1e-06"),
        ("interpolation", "cubic", "bicubic"),
        ("interpolation", ["bicubic"], "bicubic"),
        ("crop_pct", 0.0, "a number above 0, at most 2"),
        ("crop_pct", 1e-3, "at most 100,000,000 pixels before the crop"),
        ("crop_mode", "middle", "center"),
        ("exif", "rotate", "upright"),
    ],
)
def test_invalid_preprocessing_is_rejected(field: str, value: Any, expected: str) -> None:
    with pytest.raises(SpecError, match=expected):
        Preprocessing(**{**PREPROCESSING, field: value})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"classes": ("one",)}, "at least two"),
        ({"classes": {"a": 1, "b": 2}}, "classes .*a list of names"),
        ({"classes": ("a", 3)}, "a list of names"),
        ({"classes": ("a", "\ud800")}, "a list of names"),
        ({"wnids": ("n1",)}, "none or 2 ids"),
        ({"arch": ""}, "arch"),
        ({"arch": 7}, "arch .*expected text"),
        ({"preprocessing": None}, "preprocessing"),
        ({"output_form": {}}, "output_form"),
    ],
)
def test_an_invalid_spec_is_rejected(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(SpecError, match=expected):
        spec(**changes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "spec in m.onnx is not JSON"),
        ("[]", "has schema 'list', expected 'advprop.spec/1'"),
        ('{"schema": "advprop.spec/9"}', "has schema 'advprop.spec/9'"),
        ('{"schema": "advprop.spec/1"}', "incomplete or has unknown fields: 'preprocessing'"),
        (spec().to_json().replace('"arch"', '"arc"'), "incomplete or has unknown fields"),
        ("[" * 100_000, "is not JSON"),
        ("9" * 6_000, "is not JSON"),
        (" " * 9_000_000, "a text of at most 8,388,608 characters"),
    ],
)
def test_text_that_is_not_a_spec_is_rejected(text: str, expected: str) -> None:
    with pytest.raises(SpecError, match=expected):
        ModelSpec.from_json(text, where="m.onnx")


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("224", ImageSizes((224, 224), (224, 224), (224, 224))),
        ("256x320", ImageSizes((256, 320), (256, 320), (256, 320))),
        ("160:224:320", ImageSizes((160, 160), (224, 224), (320, 320))),
        ("64x96:128X96:128x256", ImageSizes((64, 96), (128, 96), (128, 256))),
    ],
)
def test_image_sizes_are_parsed_and_formatted(text: str, sizes: ImageSizes) -> None:
    assert ImageSizes.parse(text) == sizes == ImageSizes.parse(str(sizes))
    assert sizes.fixed == (":" not in text)


@pytest.mark.parametrize("text", ["", "big", "1:2", "0", "-5", "320:224:160", "64x", "64:64x32:64", "100000"])
def test_invalid_image_sizes_are_rejected(text: str) -> None:
    with pytest.raises(ConfigError, match=r"image sizes? .*found"):
        ImageSizes.parse(text)
