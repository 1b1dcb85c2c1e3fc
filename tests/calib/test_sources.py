import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calib.images import calibration_set
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


def all_batches(source: Path) -> np.ndarray:
    return np.concatenate(list(calibration_set(source, spec=SPEC).batches(SPEC)))


@pytest.mark.parametrize("name", ["photos.tar", "photos.tar.gz"])
def test_a_tar_file_has_the_images_of_its_folder(folder: Path, tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / name, "w:gz" if name.endswith("gz") else "w") as tar:
        tar.add(folder, arcname=".")
        tar.addfile(tarfile.TarInfo("notes.txt"), io.BytesIO())
    np.testing.assert_array_equal(all_batches(tmp_path / name), all_batches(folder))
    chosen = calibration_set(tmp_path / name)
    chosen.save(tmp_path / "calib.json")
    assert calibration_set(tmp_path / "calib.json") == chosen
    assert chosen.sha256 == calibration_set(folder).sha256


@pytest.mark.parametrize("name", ["photos.npy", "photos.npz"])
def test_the_images_of_an_array(tmp_path: Path, name: str) -> None:
    if name.endswith("z"):
        np.savez(tmp_path / name, labels=np.arange(12), images=pixels())
    else:
        np.save(tmp_path / name, pixels())
    expected = pixels().transpose(0, 3, 1, 2) / np.float32(127.5) - 1
    np.testing.assert_allclose(all_batches(tmp_path / name), expected, atol=1e-6)
