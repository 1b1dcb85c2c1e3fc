import json

import pytest

from runtime.errors import SpecError
from runtime.spec import ModelSpec, Preprocessing

SIZE = {
    "height": 224,
    "width": 160,
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.2, 0.2),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
}


def spec(**changes: object) -> ModelSpec:
    return ModelSpec(
        **{"arch": "resnet18", "classes": ("Katze", "犬"), "preprocessing": Preprocessing(**SIZE), **changes}
    )


def test_json_round_trip_is_exact_and_stable() -> None:
    first = spec(wnids=("n1", "n2"), recipe="advprop", checkpoint_sha256="ab")
    text = first.to_json()
    assert ModelSpec.from_json(text) == first
    assert ModelSpec.from_json(text).to_json() == text
    assert json.loads(text)["schema"] == "advprop.spec/1"


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("height", 0, "height and width"),
        ("mean", (0.5, 0.5), "three finite numbers"),
        ("std", (0.0, 0.2, 0.2), "numbers above zero"),
        ("interpolation", "cubic", "bicubic"),
        ("crop_pct", 0.0, r"in \(0, 2\]"),
        ("crop_mode", "middle", "center"),
    ],
)
def test_preprocessing_that_makes_no_sense(field: str, value: object, expected: str) -> None:
    with pytest.raises(SpecError, match=expected):
        Preprocessing(**{**SIZE, field: value})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"classes": ("one",)}, "at least two"), ({"wnids": ("n1",)}, "none or 2 ids"), ({"arch": ""}, "arch")],
)
def test_spec_that_makes_no_sense(changes: dict[str, object], expected: str) -> None:
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
    ],
)
def test_text_that_is_not_a_spec(text: str, expected: str) -> None:
    with pytest.raises(SpecError, match=expected):
        ModelSpec.from_json(text, where="m.onnx")
