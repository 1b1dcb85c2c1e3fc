from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calib.images import calibration_set, check_mix
from runtime.errors import ConfigError, DataError
from runtime.spec import Preprocessing

SPEC = Preprocessing(
    height=16, width=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear", crop_pct=1.0
)


def pixels(count: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(pixels()):
        Image.fromarray(image).save(tmp_path / "photos" / f"{number:02}.png")
    return tmp_path / "photos"


def test_held_out_images_are_not_calibration_images(folder: Path) -> None:
    chosen = calibration_set(folder, 8, held=True)
    assert (len(chosen.images), len(chosen.held)) == (8, 4)
    assert not set(chosen.images) & set(chosen.held)
    few = calibration_set(folder, 100, held=True)
    assert (len(few.images), len(few.held)) == (9, 3)
    assert calibration_set(folder, 8).held == ()
    batches = list(chosen.batches(SPEC, held=True))
    assert [len(batch) for batch in batches] == [4]


def test_corruptions_depend_on_the_image_and_the_seed(folder: Path, tmp_path: Path) -> None:
    mixed = calibration_set(folder, mix=("clean", "corrupted"), seed=3)
    batches = list(mixed.batches(SPEC))
    assert len(batches) == 6
    plain = list(calibration_set(folder).batches(SPEC))
    for clean, corrupted, expected in zip(batches[::2], batches[1::2], plain, strict=True):
        np.testing.assert_array_equal(clean, expected)
        assert (np.abs(corrupted - clean).mean((1, 2, 3)) > 0.001).all()
    mixed.save(tmp_path / "calib.json")
    again = calibration_set(tmp_path / "calib.json")
    assert again == mixed
    for one, other in zip(batches, again.batches(SPEC), strict=True):
        np.testing.assert_array_equal(one, other)
    other_seed = calibration_set(folder, mix=("clean", "corrupted"), seed=4)
    assert len({mixed.sha256, other_seed.sha256, calibration_set(folder).sha256}) == 3
    assert any((one != other).any() for one, other in zip(batches, other_seed.batches(SPEC), strict=True))
    assert len(list(mixed.batches(SPEC, 4))) == 2  # two images, in two variants each


def test_adversarial_images_come_from_the_adversary(folder: Path) -> None:
    chosen = calibration_set(folder, mix=("clean", "adversarial"))
    clean, attacked = list(chosen.batches(SPEC, adversary=lambda batch: batch + 1))[:2]
    np.testing.assert_array_equal(attacked, clean + 1)
    check_mix(("clean", "adversarial"), lambda batch: batch)


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        (("clear",), "found 'clear'; did you mean clean"),
        ((), "at least one kind, and each kind once; found none"),
        (("clean", "clean"), "each kind once; found clean,clean"),
        (("adversarial",), "adversarial images need gradients, which an ONNX file cannot provide"),
    ],
)
def test_invalid_mixes_are_refused(mix: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_mix(mix, None)


def test_copies_uniform_and_small_images_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.save(tmp_path / "same.npy", np.repeat(pixels(1), 5, axis=0))
    with pytest.raises(DataError, match="all 5 images are copies of the same image"):
        calibration_set(tmp_path / "same.npy", spec=SPEC)
    gray = pixels()
    gray[3] = 128
    np.save(tmp_path / "gray.npy", gray)
    assert len(calibration_set(tmp_path / "gray.npy", spec=SPEC).images) == 11
    assert "skipped 3: all its pixels have the same color" in caplog.text
    np.save(tmp_path / "small.npy", pixels()[:, :7, :7])
    calibration_set(tmp_path / "small.npy", spec=SPEC)
    assert "12 of 12 images are less than half as large as the network's input (16 x 16)" in caplog.text


def test_folders_without_usable_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no such file or folder"):
        calibration_set(tmp_path / "none")
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(DataError, match="found 1 images, none of which can be used"):
        calibration_set(tmp_path)


def test_a_manifest_restores_the_set_until_an_image_changes(folder: Path, tmp_path: Path) -> None:
    calibration_set(folder).save(tmp_path / "calib.json")
    assert calibration_set(tmp_path / "calib.json") == calibration_set(folder)
    (folder / "01.png").write_bytes((folder / "00.png").read_bytes())
    with pytest.raises(DataError, match=r"01\.png is not the image that .*its content has changed.*--data .*photos"):
        calibration_set(tmp_path / "calib.json")
    (folder / "01.png").unlink()
    with pytest.raises(DataError, match=r"lists an image that does not exist: 01\.png"):
        calibration_set(tmp_path / "calib.json")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such calibration manifest"),
        ("[]", "is not a calibration manifest"),
        ('{"format": "other"}', "has format 'other'"),
    ],
)
def test_files_that_are_not_a_manifest(tmp_path: Path, content: str | None, expected: str) -> None:
    if content is not None:
        (tmp_path / "calib.json").write_text(content)
    with pytest.raises(DataError, match=expected):
        calibration_set(tmp_path / "calib.json")
