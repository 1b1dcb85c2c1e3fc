import io
import tarfile
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
    for number, image in enumerate(pixels()):
        path = tmp_path / "photos" / f"class{number % 2}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "photos"


def all_batches(source: Path, **wishes) -> np.ndarray:
    return np.concatenate(list(calibration_set(source, spec=SPEC, **wishes).batches(SPEC)))


@pytest.mark.parametrize("name", ["photos.tar", "photos.tar.gz"])
def test_a_tar_file_is_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / name, "w:gz" if name.endswith("gz") else "w") as tar:
        tar.add(folder, arcname=".")
        tar.addfile(tarfile.TarInfo("notes.txt"), io.BytesIO())
    np.testing.assert_array_equal(all_batches(tmp_path / name), all_batches(folder))
    chosen = calibration_set(tmp_path / name)
    chosen.save(tmp_path / "calib.json")
    assert calibration_set(tmp_path / "calib.json") == chosen
    assert chosen.sha256 == calibration_set(folder).sha256


@pytest.mark.parametrize("name", ["photos.npy", "photos.npz"])
def test_an_array_of_pixels(tmp_path: Path, name: str) -> None:
    if name.endswith("z"):
        np.savez(tmp_path / name, labels=np.arange(12), images=pixels())
    else:
        np.save(tmp_path / name, pixels())
    expected = pixels().transpose(0, 3, 1, 2) / np.float32(127.5) - 1
    np.testing.assert_allclose(all_batches(tmp_path / name), expected, atol=1e-6)


def test_held_out_images_are_others(folder: Path) -> None:
    chosen = calibration_set(folder, 8, held=True)
    assert (len(chosen.images), len(chosen.held)) == (8, 4)
    assert not set(chosen.images) & set(chosen.held)
    few = calibration_set(folder, 100, held=True)
    assert (len(few.images), len(few.held)) == (9, 3)
    assert calibration_set(folder, 8).held == ()
    batches = list(chosen.batches(SPEC, held=True))
    assert [len(batch) for batch in batches] == [4]


def test_corruptions_are_drawn_by_image_and_seed(folder: Path, tmp_path: Path) -> None:
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
    assert len(list(mixed.batches(SPEC, 4))) == 2  # two images, each as both


def test_attacked_images_come_from_the_adversary(folder: Path) -> None:
    chosen = calibration_set(folder, mix=("clean", "adversarial"))
    clean, attacked = list(chosen.batches(SPEC, adversary=lambda batch: batch + 1))[:2]
    np.testing.assert_array_equal(attacked, clean + 1)
    check_mix(("clean", "adversarial"), lambda batch: batch)


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        (("clear",), "found 'clear'; did you mean clean"),
        ((), "at least one; found none"),
        (("clean", "clean"), "names each kind once"),
        (("adversarial",), "adversarial images need gradients, which an ONNX file does not give"),
    ],
)
def test_mixes_that_cannot_be(mix: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_mix(mix, None)


def test_images_that_say_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.save(tmp_path / "same.npy", np.repeat(pixels(1), 5, axis=0))
    with pytest.raises(DataError, match="all 5 images are copies of one"):
        calibration_set(tmp_path / "same.npy", spec=SPEC)
    gray = pixels()
    gray[3] = 128
    np.save(tmp_path / "gray.npy", gray)
    assert len(calibration_set(tmp_path / "gray.npy", spec=SPEC).images) == 11
    assert "skipped 3: it is of one color" in caplog.text
    np.save(tmp_path / "small.npy", pixels()[:, :7, :7])
    calibration_set(tmp_path / "small.npy", spec=SPEC)
    assert "12 of 12 images are less than half as large as the network's input (16 x 16)" in caplog.text
