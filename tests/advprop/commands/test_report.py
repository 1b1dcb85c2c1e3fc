"""`advprop report --from`: from a checkpoint to the page, in one run or resumed."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from advprop.cli import main
from advprop.measure_checkpoint import MeasureConfig, measure_checkpoint
from advprop.split import split
from calib.images import CalibrationImage
from runtime.errors import BackendUnavailable, ConfigError
from runtime.evaluate.cells import SuiteConfig
from runtime.evaluate.suites import open_suite
from runtime.system.files import sha256_file
from tests.support.checkpoints import save_resnet10t
from tests.support.evaluation_sets import COLORS, hide_frost_textures, labeled_folder, picture, spec_of
from train.models import create_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the checkpoint of an untrained network, with a fixed seed."""
    torch.manual_seed(0)
    model = create_model("resnet10t", num_classes=3)
    images = np.stack([picture(color, 100 + number) for number in range(4) for color in COLORS])
    return save_resnet10t(tmp_path_factory.mktemp("checkpoint") / "best.pt", model, images)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labeled_folder(tmp_path_factory.mktemp("data"), count=24)


def report(checkpoint: Path, *arguments: object) -> Result:
    options = ["--suite", "imagenet", "--workers", "0", "--device", "cpu", "--threads", "1"]
    return CliRunner().invoke(main, ["report", "--from", str(checkpoint), *map(str, arguments), *options])


@pytest.mark.slow
def test_a_page_is_built_from_a_checkpoint_and_resumed(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    command = ["--data", data, "--precisions", "fp32,int8", "-o", page]
    run = report(checkpoint, *command)
    assert run.exit_code == 0, run.output
    assert "evaluated on 54 of the 72 images" in run.output
    assert "calibrated on 18 of the others" in run.output
    first = page.read_bytes()
    for name in ("best", "best.fp32", "best.int8"):
        assert f"<bdi>{name}</bdi>" in page.read_text()
    work = tmp_path / "page"
    results = [json.loads(path.read_text()) for path in (work / "evaluation").glob("*.json")]
    references = {result["model"]["name"]: result["reference"] is None for result in results}
    assert references == {"best": True, "best.fp32": False, "best.int8": False}
    calibrated = json.loads((work / "int8" / "model.int8.calib.json").read_text())
    assert len(calibrated["images"]) == 18
    by_class = [name.split("/")[0] for name, _ in calibrated["images"]]
    assert [by_class.count(color) for color in COLORS] == [6, 6, 6]
    times = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    again = report(checkpoint, *command)
    assert again.exit_code == 0, again.output
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()} == times  # no step is repeated
    assert page.read_bytes() == first
    (work / "evaluation" / "best.int8.imagenet.json").unlink()  # as if the run had stopped before it wrote this file
    assert report(checkpoint, *command).exit_code == 0
    assert page.read_bytes() == first
    for file in (work / "fp32" / "model.onnx", work / "int8" / "model.int8.onnx"):
        assert file.stat().st_mtime_ns == times[file]


def test_calibration_images_are_never_evaluated(data: Path, tmp_path: Path) -> None:
    suite, spec = SuiteConfig(name="corruptions", data=data, limit=30), spec_of()

    def evaluated(config: SuiteConfig) -> set[str]:
        return {sha256_file(data / name) for name in open_suite(config, spec).cells[0].images.names}

    def hashes(images: tuple[CalibrationImage, ...]) -> set[str]:
        return {image.sha256 for image in images}

    parts = split(suite, spec, None, 256)
    assert parts.suite.limit == 30
    assert len(parts.calibration.images) == 42
    assert not hashes(parts.calibration.images) & evaluated(parts.suite)
    # Given images count by their content, not by their names.
    other = tmp_path / "other"
    other.mkdir()
    for number, path in enumerate(sorted(data.rglob("*.png"))):
        os.link(path, other / f"{number}.png")
    parts = split(suite, spec, other, 256)
    assert len(parts.calibration.images) == 42
    assert "30 others are evaluated and were excluded" in parts.description
    assert not hashes(parts.calibration.images) & evaluated(parts.suite)
    with pytest.raises(ConfigError, match=r"all images of .* are evaluated too"):
        split(dataclasses.replace(suite, limit=None), spec, other, 256)
    with pytest.raises(ConfigError, match=r"--limit 56 or less"):
        split(dataclasses.replace(suite, limit=70), spec, None, 256)


def test_invalid_precisions_are_refused(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    for precisions, words in (("fp32,int9", "found 'int9'"), ("fp32,fp32", "each precision once"), ("", "found none")):
        run = report(checkpoint, "--data", data, "--precisions", precisions, "-o", tmp_path / "r.html")
        assert run.exit_code == 2
        assert words in run.stderr
    with pytest.raises(ConfigError, match="not among the precisions"):
        MeasureConfig(
            precisions=("fp16",), suite=SuiteConfig(name="imagenet", data=data), folder=tmp_path, calib_data=data
        )


def test_missing_textures_are_reported_before_the_export(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_frost_textures(tmp_path / "site", monkeypatch)
    config = MeasureConfig(
        precisions=("fp32",), suite=SuiteConfig(name="corruptions", data=data), folder=tmp_path / "w", device="cpu"
    )
    with pytest.raises(BackendUnavailable, match="imagecorruptions-imaug does not contain"):
        measure_checkpoint(checkpoint, config)
    assert list((tmp_path / "w").iterdir()) == []
