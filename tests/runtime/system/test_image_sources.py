import io
import logging
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.errors import DataError
from runtime.system.image_sources import (
    ArraySource,
    FolderSource,
    class_folders,
    find_images,
    image_paths,
    open_source,
    spread,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Write two class folders with three images each."""
    for number, image in enumerate(PIXELS):
        path = tmp_path / "photos" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "photos"


def pack(folder: Path, target: Path) -> Path:
    with tarfile.open(target, "w:gz" if target.name.endswith("gz") else "w") as tar:
        tar.add(folder, arcname=".")
        tar.addfile(tarfile.TarInfo("./notes.txt"), io.BytesIO())
    return target


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_a_tar_file_holds_the_images_of_its_folder(photos: Path, tmp_path: Path, suffix: str) -> None:
    with open_source(pack(photos, tmp_path / f"photos.{suffix}")) as tar, open_source(photos) as folder:
        assert [name.removeprefix("./") for name in tar.names] == list(folder.names)
        assert [tar.read(name) for name in tar.names] == [folder.read(name) for name in folder.names]


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_rows_of_an_array_are_images(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"photos.{suffix}"
    if suffix == "npz":
        np.savez(path, labels=np.arange(6), images=PIXELS)
    else:
        np.save(path, PIXELS)
    source = open_source(path)
    assert list(source.names) == ["0", "1", "2", "3", "4", "5"]
    np.testing.assert_array_equal(np.stack([source.read(name) for name in source.names]), PIXELS)
    with pytest.raises(DataError, match="has no image 6; it has 6 images"):
        source.read("6")


def test_a_source_travels_to_another_process_without_its_images(tmp_path: Path, photos: Path) -> None:
    np.save(tmp_path / "many.npy", np.zeros((1000, 8, 8, 3), np.uint8))
    array = ArraySource(tmp_path / "many.npy")
    assert len(array.names) == 1000
    content = pickle.dumps(array)
    assert len(content) < 1000
    assert pickle.loads(content).read("999").shape == (8, 8, 3)
    assert pickle.loads(pickle.dumps(FolderSource(photos))) == FolderSource(photos)


def test_invalid_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a folder, a tar file or a NumPy file of images; found no such file"):
        open_source(tmp_path / "none")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="found a file of another kind"):
        open_source(tmp_path / "a.txt")
    (tmp_path / "cut.tar").write_bytes(b"not a tar")
    with pytest.raises(DataError, match=r"cut\.tar is not a tar file"):
        open_source(tmp_path / "cut.tar")
    np.save(tmp_path / "floats.npy", np.zeros((4, 3, 8, 8)))
    with pytest.raises(DataError, match=r"expected images, uint8 \(N, H, W, 3\); found float64 \(4, 3, 8, 8\)"):
        open_source(tmp_path / "floats.npy")
    np.save(tmp_path / "pickled.npy", np.asarray([{}]), allow_pickle=True)
    with pytest.raises(DataError, match=r"pickled\.npy is not a complete .npy file"):
        open_source(tmp_path / "pickled.npy")


@pytest.mark.parametrize(
    "entry", [".Trash/1.png", ".ipynb_checkpoints/1.png", "._1.png", "__MACOSX/1.png", "@eaDir/1.png"]
)
def test_hidden_and_system_entries_are_skipped_and_counted(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, entry: str
) -> None:
    before = find_images(photos, class_folders(photos))
    for parent in (photos, photos / "class0"):
        (parent / entry).parent.mkdir(exist_ok=True)
        (parent / entry).write_bytes((photos / "class0" / "0.png").read_bytes())
    with caplog.at_level(logging.WARNING):
        assert class_folders(photos) == ["class0", "class1"]
        assert find_images(photos, class_folders(photos)) == before
    assert "skipped 1 hidden or system entries" in caplog.text
    if "/" in entry:
        assert f"{photos}: skipped 1 hidden or system folders ({entry.partition('/')[0]})" in caplog.text
    with open_source(pack(photos, tmp_path / "photos.tar")) as tar:
        assert len(tar.names) == 6


def test_a_link_to_a_folder_elsewhere_is_followed(photos: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in class_folders(photos):
        (linked / name).symlink_to(photos / name)
    assert find_images(linked, class_folders(linked)) == find_images(photos, class_folders(photos))
    (linked / "more").mkdir()
    (linked / "more" / "deep").symlink_to(photos)
    assert len(find_images(linked / "more")[""]) == 6


def test_loops_and_links_into_another_class_are_skipped(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = find_images(photos, class_folders(photos))
    (photos / "class0" / "up").symlink_to(photos)
    (photos / "class0" / "self").symlink_to(photos / "class0")
    (photos / "class0" / "other").symlink_to(photos / "class1")
    (photos / "class0" / "9.png").symlink_to(photos / "class1" / "1.png")
    with caplog.at_level(logging.WARNING):
        assert find_images(photos, class_folders(photos)) == before
    assert "skipped 2 links into the folder of another class, 2 links to a folder that contains them" in caplog.text


def test_files_of_other_kinds_and_broken_links_are_not_images(photos: Path) -> None:
    (photos / "notes.txt").write_text("")
    (photos / "gone.png").symlink_to(photos / "nothing.png")
    (photos / "folder.png").mkdir()
    assert len(image_paths(photos)) == 6
    with pytest.raises(DataError, match="found no image files; expected"):
        image_paths(photos / "folder.png")
    with pytest.raises(DataError, match="no such folder of images"):
        image_paths(photos / "none")


@pytest.mark.parametrize("suffix", [".jfif", ".JPE", ".pgm", ".avif", ".jp2"])
def test_less_common_suffixes_are_images(photos: Path, suffix: str) -> None:
    (photos / "class0" / "0.png").rename(photos / "class0" / f"0{suffix}")
    assert len(image_paths(photos)) == 6


def test_images_of_formats_that_are_not_decoded_are_counted(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("1.heic", "2.HEIC", "3.jxl"):
        (photos / "class0" / name).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert len(image_paths(photos)) == 6
    assert "skipped 2 .heic files, a format that is not decoded, 1 .jxl files, a format" in caplog.text


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root can read every folder")
def test_a_folder_that_cannot_be_read_is_reported(photos: Path) -> None:
    (photos / "class0").chmod(0)
    try:
        with pytest.raises(DataError, match=r"cannot read .*class0: Permission denied"):
            image_paths(photos)
    finally:
        (photos / "class0").chmod(0o755)


def test_spread_takes_evenly_spaced_items() -> None:
    assert spread(range(9), 3) == [0, 4, 8]
    assert spread([1, 2], 5) == [1, 2]
