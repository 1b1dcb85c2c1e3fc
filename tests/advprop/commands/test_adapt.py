"""`advprop adapt`, from exported file to the files that follow from it."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import advprop
from advprop.cli import main
from export.to_onnx import to_onnx
from runtime.adapt.moments import with_clean_moments
from runtime.evaluate.corruptions import corrupt
from runtime.graph.model import save_onnx
from runtime.graph.norms import read_norms
from runtime.graph.read import sha256_onnx
from runtime.graph.structure import metadata
from runtime.preprocessing import normalize
from tests.support.evaluation_sets import COLORS, labeled_folder, picture, spec_of
from tests.support.norm_networks import Colors

SPEC = spec_of()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with model.onnx, images of a foggy place, and clean images by class."""
    folder = tmp_path_factory.mktemp("adapt")
    inputs = normalize(
        np.stack([picture(color, 100 + number) for color in COLORS for number in range(20)]), SPEC.preprocessing
    )
    save_onnx(with_clean_moments(to_onnx(Colors(inputs).eval(), SPEC), [inputs]), folder / "model.onnx")
    (folder / "foggy").mkdir()
    for number in range(36):
        image = corrupt(picture(list(COLORS)[number % 3], number), "fog", 5, key=number)
        Image.fromarray(image).save(folder / "foggy" / f"{number}.png")
    labeled_folder(folder / "clean", count=12)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["adapt", *map(str, arguments), "--threads", "1"])


def test_it_writes_the_adapted_file_and_a_report_with_the_same_record(folder: Path) -> None:
    result = run(folder / "model.onnx", "--data", folder / "foggy", "--clean", folder / "clean")
    assert result.exit_code == 0, result.output
    for text in ("expected accuracy", "accuracy on 36 clean images", "evidence of a shift", "wrote"):
        assert text in result.output
    model = onnx.load(folder / "model.foggy.onnx")
    record = json.loads(metadata(model, "advprop.adaptation"))
    report = json.loads((folder / "model.foggy.json").read_text())
    assert report | record == report
    assert record["source_sha256"] == sha256_onnx(folder / "model.onnx")
    assert (record["images"], record["prior"], record["verdict"]) == (36, "auto", "adapt")
    assert [layer["tensor"] for layer in report["layers"]] == list(read_norms(model))


def test_images_that_are_not_shifted_are_refused_unless_forced(folder: Path, tmp_path: Path) -> None:
    arguments = (folder / "model.onnx", "--data", folder / "clean", "-o", tmp_path / "new" / "out.onnx")
    refused = run(*arguments)
    assert refused.exit_code == 5
    assert "not shifted" in refused.output and "expected at least 15%" in refused.output
    assert not (tmp_path / "new").exists()
    forced = run(*arguments, "--force", "--json")
    assert forced.exit_code == 0 and (tmp_path / "new" / "out.onnx").exists()
    assert json.loads(forced.stdout)["verdict"] == "not_shifted"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prior", "some"], "expected auto, or a number"),
        (["-o", "model.txt"], "NAME.onnx"),
        (["--data", "nothing"], "nothing"),
    ],
)
def test_invalid_options_are_reported(folder: Path, arguments: list[str], expected: str) -> None:
    result = run(folder / "model.onnx", "--data", folder / "foggy", *arguments)
    assert result.exit_code == 2 and expected in result.output


def test_the_adapted_file_is_described_reduced_and_not_adapted_again(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapted.onnx"
    found = advprop.adapt(folder / "model.onnx", folder / "foggy", path)
    assert found.path == path and found.adaptation.verdict.adapts
    inspected = CliRunner().invoke(main, ["inspect", str(path), "--json"])
    assert "to 36 field images, an automatic prior" in json.loads(inspected.stdout)["adapted"]
    half = tmp_path / "adapted.fp16.onnx"
    options = ["--precision", "fp16", "--data", str(folder / "foggy"), "-o", str(half)]
    converted = CliRunner().invoke(main, ["convert", str(path), *options])
    assert converted.exit_code == 0, converted.output
    reduced = onnx.load(half)
    assert metadata(reduced, "advprop.adaptation") == metadata(onnx.load(path), "advprop.adaptation")
    assert not read_norms(reduced)
    for source, message in ((path, "already adapted"), (half, "expected a float32 file")):
        again = run(source, "--data", folder / "foggy", "-o", tmp_path / "again.onnx")
        assert again.exit_code == 2 and message in " ".join(again.output.split())


def test_the_exit_code_of_a_damaged_image_folder_names_the_fix(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    result = run(folder / "model.onnx", "--data", tmp_path)
    assert result.exit_code == 2 and "no images that can be used" in result.output
