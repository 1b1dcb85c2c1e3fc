import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from runtime.errors import ConfigError, DataError
from runtime.spec import Preprocessing
from train.config import DataConfig
from train.data import ImageSet, choose_preprocessing, embedded_digits
from train.folders import image_folder as open_folder
from train.loaders import eval_loader, train_loader
from train.samples import BAD_LABEL, transformed

CPU = torch.device("cpu")
SPEC = Preprocessing(height=32, width=32, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0)
MODEL = {
    "input_size": (3, 224, 224),
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
}


def batches(root: Path, workers: int = 0, epoch: int = 0, start: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    config = DataConfig(root=root, workers=workers)
    loader = train_loader(open_folder(root), config, SPEC, batch_size=8, seed=5, device=CPU)
    loader.start_at(epoch, start)
    return list(loader)


def test_digits_are_complete_and_split_by_class() -> None:
    data = embedded_digits()
    assert isinstance(data.train, ImageSet) and isinstance(data.val, ImageSet)
    assert (len(data.train.labels), len(data.val.labels)) == (1437, 360)
    assert min(np.bincount(data.val.labels)) >= 34
    pixels = np.stack([np.asarray(data.train.images[number]) for number in range(1437)])
    assert pixels.dtype == np.uint8
    assert pixels.max() == 255


def test_batches_depend_on_seed_and_epoch_only(image_folder: Path) -> None:
    first = batches(image_folder)
    assert len(first) == 6
    again, in_workers = batches(image_folder), batches(image_folder, workers=2)
    resumed, other = batches(image_folder, start=4), batches(image_folder, epoch=1)
    for (images, labels), *rest in zip(first, again, in_workers, strict=True):
        assert all(torch.equal(images, item[0]) and torch.equal(labels, item[1]) for item in rest)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first[4:], resumed, strict=True))
    assert not torch.equal(first[0][0], other[0][0])


@pytest.mark.parametrize("rule", ["upright", "ignore"])
def test_photographs_are_rotated_in_training_and_validation_as_the_spec_says(tmp_path: Path, rule: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255
    for number in range(16):
        for part in ("train", "val"):
            path = tmp_path / part / str(number % 2) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, exif=exif)
    data = open_folder(tmp_path)
    config = DataConfig(root=tmp_path, workers=0, exif=rule, crop_scale=(1.0, 1.0), color_jitter=0.0)
    spec = choose_preprocessing(data, config, MODEL)
    assert spec.exif == rule
    training = train_loader(data, config, spec, batch_size=8, seed=5, device=CPU)
    training.start_at(0, 0)
    validation = eval_loader(data, config, spec, batch_size=8, device=CPU)
    for images, _ in (*training, *validation):
        bright_at_top = images[:, :, 2] > images[:, :, -3]
        assert bright_at_top.all() if rule == "ignore" else not bright_at_top.any()


def test_loading_does_not_advance_the_random_generators(image_folder: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    batches(image_folder)
    assert torch.equal(torch.rand(3), expected)


def test_input_size_is_reduced_for_small_images(image_folder: Path) -> None:
    data = open_folder(image_folder)
    chosen = choose_preprocessing(data, DataConfig(root=image_folder), MODEL)
    assert (chosen.height, chosen.crop_pct) == (64, 1.0)  # 36 px, rounded up to a multiple of 32
    explicit = choose_preprocessing(data, DataConfig(root=image_folder, img_size=24), MODEL)
    assert (explicit.height, explicit.crop_pct) == (24, 0.9)


def test_wordnet_ids_are_replaced_by_names(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for wnid in ("n01440764", "n01443537"):
            (tmp_path / part / wnid).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / wnid / "a.png")
    data = open_folder(tmp_path)
    assert data.wnids == ("n01440764", "n01443537")
    assert [name.split(",")[0] for name in data.classes] == ["tench", "goldfish"]


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        ([], "no such folder; expected a folder with CLASS/IMAGE"),
        (["other/"], "found 0 images in 0 class folders"),
        (["x.png", "y.png"], "found 2 images without class folders; expected CLASS/IMAGE"),
        (["val/a/x.png", "val/b/x.png"], r"found val; .*train is missing"),
        (["train/a/x.png", "train/b/x.png"], "no class has two images.*--val-data"),
        (["photos/a/x.png", "photos/b/x.png"], "one folder per class; use --data .*photos"),
        (["train/", "val/"], "found 0 images in 0 class folders"),
        (["train/a/x.png", "val/a/x.png"], "1 images in 1 class folders; expected at least two"),
        (["train/x.png", "train/a/x.png", "val/a/x.png"], "in 1 class folders"),
        (["train/a/x.png", "train/b/x.png", "val/"], "found no images"),
        (["train/a/x.png", "train/b/x.png", "val/c/x.png"], "classes that are missing from train: c"),
    ],
)
def test_unusable_folders_are_refused(tmp_path: Path, folders: list[str], expected: str) -> None:
    root = tmp_path / "root"
    for name in folders:
        path = root / name
        (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
        if path.suffix:
            Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(DataError, match=expected):
        open_folder(root)


def test_a_class_of_less_common_suffixes_is_read(image_folder: Path) -> None:
    for path in list(image_folder.glob("*/dark/*.png")):
        path.rename(path.with_suffix(".jfif"))
    data = open_folder(image_folder)
    assert (data.classes, len(data.train)) == (("bright", "dark"), 48)


def test_a_class_of_formats_that_are_not_decoded_is_refused(image_folder: Path) -> None:
    """Without the error, the network would be trained on the other classes only."""
    for part in ("train", "val"):
        (image_folder / part / "heron" / "day1").mkdir(parents=True)
        (image_folder / part / "heron" / "day1" / "1.HEIC").write_bytes(b"")
    with pytest.raises(DataError, match=r"the class heron has no image that can be decoded; found 1 \.heic files"):
        open_folder(image_folder)


def test_classes_without_images_are_reported(image_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for part in ("train", "val"):
        (image_folder / part / "empty").mkdir()
    for path in (image_folder / "val" / "dark").iterdir():
        path.unlink()
    with caplog.at_level(logging.WARNING):
        assert open_folder(image_folder).classes == ("bright", "dark")
    assert f"{image_folder / 'train'}: ignored 1 classes without images: empty" in caplog.text
    assert f"{image_folder / 'val'} has no images of 1 classes: dark" in caplog.text


def test_junk_of_operating_systems_is_not_trained_on(image_folder: Path) -> None:
    image = (image_folder / "train" / "dark" / "0.png").read_bytes()
    for junk in (".Trash/0.png", ".ipynb_checkpoints/0.png", "@eaDir/0.png", "._0.png"):
        path = image_folder / "train" / "bright" / junk
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image)
    (image_folder / "train" / "__MACOSX" / "dark").mkdir(parents=True)
    (image_folder / "train" / "__MACOSX" / "dark" / "0.png").write_bytes(image)
    (image_folder / "train" / "bright" / "all").symlink_to(image_folder / "train")
    data = open_folder(image_folder)
    assert isinstance(data.train, ImageSet)
    assert np.bincount(data.train.labels).tolist() == [24, 24]


@pytest.mark.parametrize("policy", ["randaugment", "rand-m-5", "augmix-a0", "3aa"])
def test_an_unknown_augmentation_policy_is_refused(image_folder: Path, policy: str) -> None:
    config = DataConfig(root=image_folder, workers=0, auto_augment=policy)
    with pytest.raises(ConfigError, match=f"timm has no augmentation policy '{policy}'.*set data.auto_augment to"):
        train_loader(open_folder(image_folder), config, SPEC, batch_size=8, seed=5, device=CPU)


def test_a_policy_draws_again_if_an_operation_fails() -> None:
    """Pillow refuses to posterize to 0 bits, which timm's increasing policies sometimes draw."""
    draws: Iterator[Any] = iter([ValueError("bits must be between 1 and 8"), torch.ones(3, 2, 2)])

    def transform(image: Image.Image) -> torch.Tensor:
        drawn = next(draws)
        if isinstance(drawn, ValueError):
            raise drawn
        assert isinstance(drawn, torch.Tensor)
        return drawn

    assert torch.equal(transformed(transform, Image.new("RGB", (2, 2))), torch.ones(3, 2, 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_reported_and_skipped(
    image_folder: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    bad = image_folder / "train" / "dark" / "7.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with caplog.at_level(logging.WARNING):
        found = batches(image_folder, workers)
    assert [len(labels) for _, labels in found] == [8] * 6
    assert f"cannot be decoded: {bad}" in caplog.text
    assert "1 of 48 training images" in caplog.text


def test_more_than_one_percent_of_corrupt_images_is_an_error(image_folder: Path) -> None:
    for number in range(3):
        (image_folder / "train" / "dark" / f"{number}.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match="3 of 48 training images cannot be decoded, more than 1%"):
        batches(image_folder)


def test_a_corrupt_validation_image_is_not_counted(image_folder: Path) -> None:
    (image_folder / "val" / "dark" / "0.png").write_bytes(b"not an image")
    data = open_folder(image_folder)
    loader = eval_loader(data, DataConfig(workers=0), SPEC, batch_size=8, device=CPU)
    labels = torch.cat([labels for _, labels in loader])
    assert (labels == BAD_LABEL).sum() == 1


def test_only_corrupt_images_is_an_error(tmp_path: Path) -> None:
    images = ImageSet([str(tmp_path / "a.png"), str(tmp_path / "b.png")], [0, 1])
    data = embedded_digits()
    loader = train_loader(replace(data, train=images), DataConfig(workers=0), SPEC, batch_size=2, seed=0, device=CPU)
    with pytest.raises(DataError):
        list(loader)
