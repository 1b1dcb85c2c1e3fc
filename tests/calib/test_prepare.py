from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import runtime
from advprop.cli import main
from calib.precision import to_reduced
from calib.prepare import read_float_model
from export.io_forms import with_forms
from runtime.errors import ConfigError, ModelFileError
from runtime.graph.foreign import ForeignOptions
from runtime.graph.model import run_batches
from runtime.spec import ModelSpec, Preprocessing
from tests.support.foreign_files import HEIGHT, WIDTH, write_network
from tests.support.networks import classifier

PREPROCESSING = Preprocessing(
    height=HEIGHT,
    width=WIDTH,
    mean=(0.5, 0.4, 0.3),
    std=(0.2,) * 3,
    interpolation="bilinear",
    crop_pct=1.0,
    exif="upright",
)
OPTIONS = ForeignOptions(mean=PREPROCESSING.mean, std=PREPROCESSING.std, interpolation="bilinear", crop_pct=1.0)


def test_the_file_of_another_tool_is_calibrated_from_the_command_line(tmp_path: Path) -> None:
    source = write_network(tmp_path / "other.onnx")
    photos = np.random.default_rng(1).integers(0, 256, (40, HEIGHT, WIDTH, 3), dtype=np.uint8)
    np.save(tmp_path / "photos.npy", photos)
    command = ["calibrate", str(source), "--data", str(tmp_path / "photos.npy"), "--no-cache"]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 2
    assert "describe it once with advprop convert" in refused.stderr
    command += ["--mean", "0.5,0.4,0.3", "--std", "0.2", "--interpolation", "bilinear"]
    result = CliRunner().invoke(main, [*command, "--crop-pct", "1.0", "--rest", "fp32"])
    assert result.exit_code == 0, result.output
    assert "2 of 2 layers in INT8" in result.output
    with runtime.load(tmp_path / "other.int8.onnx") as session:
        assert session.spec.preprocessing == PREPROCESSING
        found = [session.predict([photo])[0].index for photo in photos]
    normalized = ((photos / 255 - PREPROCESSING.mean) / PREPROCESSING.std).astype(np.float32).transpose(0, 3, 1, 2)
    expected = run_batches(onnx.load(source), [image[None] for image in normalized]).argmax(1)
    assert np.mean(np.asarray(found) == expected) >= 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--crop-pct", "0"], "0.0 is not in the range 0<x<=2"),
        (["--mean", "0.5,0.4"], "expected three numbers such as 0.485,0.456,0.406, or one; found '0.5,0.4'"),
        (["--std", "1/0"], "expected three numbers"),
        (["--layout", "HWC"], "'HWC' is not one of"),
        (["--bgr"], "does not contain the normalization of its images; pass --mean and --std"),
        (["--mean", "0.5"], "pass both or none"),
        (["--mean", "0", "--std", "0"], "std of a model spec"),
    ],
)
def test_options_that_cannot_be_used_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    source = write_network(tmp_path / "other.onnx")
    result = CliRunner().invoke(main, ["calibrate", str(source), "--data", str(tmp_path), *arguments])
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_only_float32_files_with_one_description_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(classifier(), path)
    with pytest.raises(ModelFileError, match=r"has no advprop.spec.*advprop convert"):
        read_float_model(path, None)
    spec = ModelSpec(arch="x", classes=tuple("abcd"), preprocessing=PREPROCESSING)
    onnx.save(with_forms(to_reduced(classifier(), "fp16"), spec), path)
    with pytest.raises(ModelFileError, match=r"m.onnx computes in fp16; calibrate the float32 file"):
        read_float_model(path, None)
    onnx.save(with_forms(classifier(), spec), path)
    assert read_float_model(path, None)[1] == PREPROCESSING
    with pytest.raises(ConfigError, match=r"contains an advprop.spec.*; remove --img-size"):
        read_float_model(path, OPTIONS)
    spec = ModelSpec(arch="x", classes=tuple("abcd"), preprocessing=PREPROCESSING, input_form="uint8 NHWC")
    onnx.save(with_forms(classifier(HEIGHT, WIDTH), spec), path)
    with pytest.raises(ModelFileError, match="uint8 NHWC input and outputs logits; calibrate a file with float32"):
        read_float_model(path, None)
