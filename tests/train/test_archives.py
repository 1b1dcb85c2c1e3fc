from pathlib import Path

import pytest
import torch

from runtime.errors import DataError
from runtime.spec import Preprocessing
from runtime.system.decode import decode
from tests.support.archive_files import files_of, pack
from train.archives import image_archives, tar_members
from train.config import DataConfig
from train.data import ImageSet
from train.datasets import open_data
from train.folders import image_folder as read_folder
from train.loaders import train_loader

CPU = torch.device("cpu")
SPEC = Preprocessing(height=32, width=32, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0)


@pytest.fixture
def packed(image_folder: Path, tmp_path: Path) -> Path:
    """Write the image folder as train.tar and val.tar."""
    for part in ("train", "val"):
        pack(tmp_path / "packed" / f"{part}.tar", files_of(image_folder / part))
    return tmp_path / "packed"


def batches(root: Path, workers: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    config = DataConfig(root=root, workers=workers)
    loader = train_loader(open_data(config), config, SPEC, batch_size=8, seed=5, device=CPU)
    loader.start_at(0)
    return list(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tar_file_is_read_like_its_folder(image_folder: Path, packed: Path, workers: int) -> None:
    folder, archive = read_folder(image_folder), image_archives(packed)
    assert archive.classes == folder.classes == ("bright", "dark")
    assert archive.short_side == 36
    assert isinstance(archive.train, ImageSet)
    assert archive.train.name(0) == f"{packed / 'train.tar'}:bright/0.png"
    for (images, labels), (expected, truth) in zip(batches(packed, workers), batches(image_folder, 0), strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, truth)


def test_one_tar_file_per_class_is_read(image_folder: Path, tmp_path: Path) -> None:
    for part in ("train", "validation"):
        for name in ("bright", "dark"):
            files = files_of(image_folder / ("val" if part == "validation" else part) / name)
            pack(tmp_path / "classes" / part / f"{name}.tar", files)
    data = open_data(DataConfig(root=tmp_path / "classes"))
    assert data.classes == ("bright", "dark")
    assert (len(data.train), len(data.val)) == (48, 16)


def test_webdataset_shards_are_read(image_folder: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        names = {"bright": b"0", "dark": b"1\n"}
        for shard, (name, label) in enumerate(names.items()):
            files: dict[str, bytes] = {}
            for path, content in files_of(image_folder / part / name).items():
                files[f"{name}{path}".replace(".png", ".seg.png")] = content
                files[f"{name}{path}".replace(".png", ".cls")] = label
            files["orphan.png"] = content
            pack(tmp_path / "shards" / f"digits-{part}-{shard:04}.tar", files)
    data = open_data(DataConfig(root=tmp_path / "shards"))
    assert data.classes == ("class 0", "class 1")
    assert isinstance(data.train, ImageSet) and isinstance(data.val, ImageSet)
    assert (len(data.train), sum(data.train.labels)) == (48, 24)
    assert decode(data.val.images[15]).size == (36, 40)


def test_an_unpacked_folder_takes_precedence_over_its_tar_file(image_folder: Path) -> None:
    pack(image_folder / "train.tar", {"a/1.png": b"", "b/1.png": b""})
    assert open_data(DataConfig(root=image_folder)).classes == ("bright", "dark")


def test_members_of_a_tar_file_are_read_by_position(image_folder: Path, packed: Path) -> None:
    files = files_of(image_folder / "train")
    assert {member.name: member.read() for member in tar_members(packed / "train.tar")} == files
    pack(packed / "train.tar.gz", files, "w:gz")
    with pytest.raises(DataError, match="Decompress it first"):
        tar_members(packed / "train.tar.gz")


@pytest.mark.parametrize("wrapper", ["", "./", "train/", "./photos/2024/"])
def test_subfolders_of_a_class_belong_to_it(image_folder: Path, tmp_path: Path, wrapper: str) -> None:
    """A tar file has the classes of the folder that it was made from."""
    for part in ("train", "val"):
        files = files_of(image_folder / part)
        nested = {
            f"{wrapper}{Path(name).parent}/day{number % 2}/{Path(name).name}": content
            for number, (name, content) in enumerate(files.items())
        }
        pack(tmp_path / "nested" / f"{part}.tar", nested)
    data, folder = image_archives(tmp_path / "nested"), read_folder(image_folder)
    assert data.classes == folder.classes
    assert isinstance(data.train, ImageSet) and isinstance(folder.train, ImageSet)
    assert list(data.train.labels) == list(folder.train.labels)


def test_a_validation_set_of_one_class(image_folder: Path, packed: Path) -> None:
    """Its only folder is a class of the training set, although it contains all images."""
    files = files_of(image_folder / "val" / "dark")
    pack(packed / "val.tar", {f"dark/day{len(name) % 2}/{name}": content for name, content in files.items()})
    val = image_archives(packed).val
    assert isinstance(val, ImageSet)
    assert set(val.labels) == {1}


def test_a_tar_file_with_a_class_of_another_format_is_refused(image_folder: Path, packed: Path) -> None:
    files = files_of(image_folder / "train") | {"heron/1.heic": b"", "heron/2.heic": b""}
    pack(packed / "train.tar", files | {"._heron/3.heic": b"", "notes.txt": b""})
    with pytest.raises(DataError, match=r"the class heron has no image that can be decoded; found 2 \.heic files"):
        image_archives(packed)


def test_unusable_tar_files_are_refused(tmp_path: Path, image_folder: Path) -> None:
    files = files_of(image_folder / "train")
    pack(tmp_path / "one" / "train.tar", files)
    with pytest.raises(DataError, match=r"no tar files of val; expected val\.tar"):
        open_data(DataConfig(root=tmp_path / "one"))
    pack(tmp_path / "one" / "val.tar", files, "w:gz")
    with pytest.raises(DataError, match=r"val\.tar as an uncompressed tar file: .*Decompress it first"):
        open_data(DataConfig(root=tmp_path / "one"))
    pack(tmp_path / "one" / "val.tar", {"dark/x.png": b"", "other/x.png": b""})
    with pytest.raises(DataError, match="classes that are missing from train: other"):
        open_data(DataConfig(root=tmp_path / "one"))
    pack(tmp_path / "two" / "train.tar", {"1.png": files["dark/0.png"], "1.cls": b"cat"})
    pack(tmp_path / "two" / "val.tar", {})
    with pytest.raises(DataError, match=r"1\.cls holds 'cat'; expected a class number"):
        open_data(DataConfig(root=tmp_path / "two"))


def test_a_truncated_tar_file_is_reported(packed: Path) -> None:
    data = image_archives(packed)
    assert isinstance(data.train, ImageSet)
    archive = packed / "train.tar"
    archive.write_bytes(archive.read_bytes()[:9000])
    with pytest.raises(DataError, match=r"train\.tar is truncated at dark/23\.png"):
        data.train.images[47]
