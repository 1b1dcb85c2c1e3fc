import json
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import ConfigError, SpecError
from runtime.graph.foreign import ForeignOptions, read_classes

WNIDS = ["n01440764", "n01443537"]


@pytest.mark.parametrize(
    ("content", "names", "wnids"),
    [
        ("cat\nred fox\n\n", ["cat", "red fox"], []),
        ("\ufeffcat\r\ndog\r\n", ["cat", "dog"], []),
        (json.dumps(["cat", "dog"]), ["cat", "dog"], []),
        (json.dumps({"1": "dog", "0": "cat"}), ["cat", "dog"], []),
        (json.dumps({"id2label": {"0": "cat", "1": "dog"}, "model_type": "vit"}), ["cat", "dog"], []),
        (json.dumps({"0": [WNIDS[0], "tench"], "1": [WNIDS[1], "goldfish"]}), ["tench", "goldfish"], WNIDS),
        ("\n".join(WNIDS), WNIDS, WNIDS),
    ],
)
def test_class_names_are_lines_or_json(tmp_path: Path, content: str, names: list[str], wnids: list[str]) -> None:
    path = tmp_path / "classes"
    path.write_bytes(content.encode())
    assert read_classes(path) == (tuple(names), tuple(wnids))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 class names; expected at least two"),
        (b"one", "has 1 class names; expected at least two"),
        (b"\xff\xfe", "cannot read the class names"),
        (b"cat\n\ndog\n", "contains '', which is not a class name"),
        (b"[1, 2]", "contains '1', which is not a class name"),
        (b'[["a", "b", "c"], "d"]', "which is not a class name"),
        (b'{"cat": 0, "dog": 1}', "keys are not the numbers 0 to 1"),
        (b'{"0": "cat", "2": "dog"}', "keys are not the numbers 0 to 1"),
        (b'{"id2label": "cat"}', "contains 'cat'"),
        (b"[" * 100_000, "is not JSON"),
        (b'[["n1", "a"], "b"]', "WordNet ids for 1 of 2 classes"),
    ],
)
def test_other_class_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "classes"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_classes(path)


def test_a_missing_class_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the class names"):
        read_classes(tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="cannot read the class names"):
        read_classes(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("crop_pct", 0.0, "above 0 and at most 2; found 0"),
        ("crop_pct", float("nan"), "above 0 and at most 2; found nan"),
        ("crop_pct", 2.5, "above 0 and at most 2; found 2.5"),
        ("crop_mode", "fit", "center, squash or border; found 'fit'"),
        ("interpolation", "cubic", "interpolation must be"),
        ("layout", "HWC", "layout must be NCHW or NHWC; found 'HWC'"),
        ("mean", (0.5, 0.5, 0.5), "pass both or none"),
        ("std", (0.5, 0.5, 0.5), "pass both or none"),
    ],
)
def test_invalid_options_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ForeignOptions(**{field: value})


@pytest.mark.parametrize("std", [(0.0, 1.0, 1.0), (float("inf"), 1.0, 1.0)])
def test_an_invalid_normalization_is_refused(std: tuple[float, float, float]) -> None:
    options = ForeignOptions(mean=(0.0, 0.0, 0.0), std=std)
    with pytest.raises(SpecError, match="std of a model spec"):
        options.preprocessing(8, 8)
