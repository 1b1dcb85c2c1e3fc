import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import runtime
from advprop.cli import main
from runtime.errors import ConfigError
from runtime.graph.summary import summarize
from runtime.spec import ModelSpec
from tests.support.foreign_files import CLASSES, COLOR_MEANS, HEIGHT, WIDTH, write_graph, write_network

NORMALIZATION = ["--mean", "0.5", "--std", "0.2"]


def convert(source: Path, *arguments: str) -> Result:
    result = CliRunner().invoke(main, ["convert", str(source), *NORMALIZATION, *arguments])
    assert result.exit_code == 0, result.stderr
    return result


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder CLASS/IMAGE of eight photos."""
    random = np.random.default_rng(0)
    for number in range(8):
        folder = tmp_path / "photos" / f"c{number % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (2 * HEIGHT, 3 * WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "photos"


def test_every_command_works_on_a_converted_file_without_options(tmp_path: Path, photos: Path) -> None:
    source = write_network(tmp_path / "net.onnx")
    (tmp_path / "classes.txt").write_text("".join(f"c{number}\n" for number in range(CLASSES)))
    convert(source, "--classes", str(tmp_path / "classes.txt"))
    file = str(tmp_path / "net.fp32.onnx")
    commands: list[list[str]] = [
        ["inspect", file],
        ["predict", file, str(photos / "c0")],
        ["eval", file, "--suite", "imagenet", "--data", str(photos), "--workers", "0", "-o", str(tmp_path / "eval")],
        ["bench", file, "--duration-s", "0.01", "--rounds", "2", "--batch-sizes", "2", "-o", str(tmp_path / "bench")],
        ["calibrate", file, "--data", str(photos), "--no-cache"],
        ["build", file, "--sm", "86"],
    ]
    for command in commands:
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, (command, result.stderr)
    evaluated = json.loads((tmp_path / "eval" / "net.fp32.imagenet.json").read_text())
    assert evaluated["model"]["arch"] == "net"


def test_a_file_without_a_spec_can_be_inspected_and_names_the_command_that_describes_it(
    tmp_path: Path, photos: Path
) -> None:
    source = write_network(tmp_path / "net.onnx")
    inspected = CliRunner().invoke(main, ["inspect", str(source)])
    assert inspected.exit_code == 0
    assert "advprop convert" in inspected.output
    for command in (["predict", str(source), str(photos)], ["eval", str(source), "--suite", "imagenet", "--data", "x"]):
        result = CliRunner().invoke(main, command)
        assert (result.exit_code, f"advprop convert {source} --img-size" in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_reduced_precision_is_compared_on_images(tmp_path: Path, photos: Path, precision: str) -> None:
    source = write_network(tmp_path / "net.onnx")
    result = convert(source, "--precision", precision, "--data", str(photos))
    assert "of 8 images have the same top-1 class as in FP32" in result.output
    summary = summarize(tmp_path / f"net.{precision}.onnx")
    assert summary.shares == {precision: 1.0}
    assert summary.spec is not None
    assert json.loads((tmp_path / f"net.{precision}.json").read_text())


def test_without_images_weights_that_overflow_stay_in_fp32(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = np.full((CLASSES, 3), 1e5)
    body = COLOR_MEANS.replace("(x)", "(image)")
    source = write_graph(tmp_path / "net.onnx", body, "float[n, 3, 8, 12] image", w=weights)
    convert(source, "--precision", "fp16")
    assert "was not compared with FP32" in caplog.text
    assert summarize(tmp_path / "net.fp16.onnx").shares == {"fp32": 1.0}


@pytest.mark.parametrize("out", ["net.onnx", "net.engine"])
def test_the_output_must_be_a_new_onnx_file(tmp_path: Path, out: str) -> None:
    source = write_network(tmp_path / "net.onnx")
    before = source.read_bytes()
    result = CliRunner().invoke(main, ["convert", str(source), *NORMALIZATION, "-o", str(tmp_path / out)])
    assert (result.exit_code, "must be a new file NAME.onnx" in result.stderr) == (2, True)
    assert source.read_bytes() == before


def spec_of_network(**changes: Any) -> ModelSpec:
    preprocessing = runtime.Preprocessing(
        height=HEIGHT, width=WIDTH, mean=(0.5,) * 3, std=(0.2,) * 3, interpolation="bicubic", crop_pct=0.875
    )
    return ModelSpec(**{"arch": "net", "classes": tuple("abcde"), "preprocessing": preprocessing, **changes})


def test_a_spec_for_load_equals_a_converted_file(tmp_path: Path, photos: Path) -> None:
    source = write_network(tmp_path / "net.onnx")
    convert(source)
    images = sorted(photos.glob("*/*"))
    with runtime.load(source, spec=spec_of_network()) as session:
        found = session.predict(images)
    with runtime.load(tmp_path / "net.fp32.onnx") as session:
        expected = session.predict(images)
    assert {prediction.label for prediction in found} <= set("abcde")
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.probabilities, other.probabilities, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "changes", [{"classes": ("a", "b")}, {"input_form": "uint8 NCHW"}, {"input_form": "uint8 NHWC"}]
)
def test_a_spec_that_does_not_fit_the_file_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = write_network(tmp_path / "net.onnx")
    with pytest.raises(ConfigError, match=r"but its spec describes.*correct the spec, or convert the file"):
        runtime.load(source, spec=spec_of_network(**changes))


def test_a_spec_for_a_file_that_contains_one_is_refused(tmp_path: Path) -> None:
    convert(write_network(tmp_path / "net.onnx"))
    with pytest.raises(ConfigError, match="contains a spec; load it without spec="):
        runtime.load(tmp_path / "net.fp32.onnx", spec=spec_of_network())


def test_a_build_that_fails_names_the_conversion_which_makes_it_work(tmp_path: Path) -> None:
    body = "t = Transpose <perm = [0, 3, 1, 2]> (image) c = Cast <to = 1> (t) x = Div(c, s) " + COLOR_MEANS
    source = write_graph(
        tmp_path / "net.onnx", body, "uint8[n, 8, 12, 3] image", w=np.ones((CLASSES, 3)), s=np.float32(255)
    )
    failed = CliRunner().invoke(main, ["build", str(source), "--sm", "86"])
    assert (failed.exit_code, f"advprop convert {source}" in failed.stderr) == (3, True), failed.stderr
    converted = CliRunner().invoke(main, ["convert", str(source)])
    assert converted.exit_code == 0, converted.stderr
    built = CliRunner().invoke(main, ["build", str(tmp_path / "net.fp32.onnx"), "--sm", "86"])
    assert built.exit_code == 0, built.stderr
