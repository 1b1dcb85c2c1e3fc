"""Every suite on a tiny folder with the layout of the released set."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime.errors import BackendUnavailable, ConfigError, DataError, SpecError
from runtime.evaluate.images import LabeledImages
from runtime.evaluate.labels import CIFAR10, IMAGENET_A, IMAGENET_R
from runtime.evaluate.models import Model
from runtime.evaluate.results import Result
from runtime.evaluate.run import evaluate
from runtime.evaluate.suites import SUITES, open_suite
from runtime.spec import ModelSpec
from runtime.system.image_sources import FolderSource
from tests.support.evaluation_sets import (
    COLORS,
    WNIDS,
    config,
    hide_frost_textures,
    labeled_folder,
    picture,
    run_config,
    save,
    spec_of,
    toy,
)


def imagenet_spec(size: int = 32) -> ModelSpec:
    """Return the spec of a model with ImageNet's 1,000 classes."""
    from timm.data import ImageNetInfo

    return spec_of(tuple(f"name {place}" for place in range(1000)), tuple(ImageNetInfo().label_names()), size)


def measure(name: str, data: Path, out: Path, spec: ModelSpec | None = None, **options: Any) -> Result:
    (result,) = evaluate([toy(spec=spec)], config(name, data, **options), run_config(out))
    return result


def cells(result: Result) -> dict[str, int]:
    return {name: cell["counts"]["images"] for name, cell in result["cells"].items()}


@pytest.mark.parametrize("suite", ["imagenet", "sketch", "stylized", "cifar10"])
@pytest.mark.parametrize("by", ["wnid", "class name"])
def test_class_folders_named_by_wnid_or_class(tmp_path: Path, suite: str, by: str) -> None:
    names = dict(zip(WNIDS if by == "wnid" else COLORS, COLORS, strict=True))
    result = measure(suite, labeled_folder(tmp_path / "set", names), tmp_path)
    assert cells(result) == {"images": 24}
    assert result["metrics"]["cells"]["images"]["top1"] == 1.0
    assert result["cells"]["images"]["resize"] == ("none" if suite == "stylized" else "fit")


def test_folders_of_unknown_classes_are_skipped_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = labeled_folder(tmp_path / "set", {"red": "red", "violet": "blue"})
    with caplog.at_level(logging.WARNING, "runtime"):
        result = measure("imagenet", data, tmp_path)
    assert cells(result) == {"images": 8}
    assert result["data"]["skipped"] == ["violet"]
    assert "1 folders match no class of the model and are skipped (violet" in caplog.text


def test_imagenet_c_is_not_resized(tmp_path: Path) -> None:
    """A model of fixed size 32 px refuses 48 px; one of open size gets the pixels as they are."""
    root = tmp_path / "c"
    for corruption, home in (("fog", root), ("snow", root / "weather"), ("spatter", root / "extra")):
        for severity in (1, 2, 3, 4, 5):
            labeled_folder(home / corruption / str(severity), dict(zip(WNIDS, COLORS, strict=True)), 2, 48)
    seen: list[tuple[int, ...]] = []

    def predict(images: np.ndarray) -> np.ndarray:
        seen.append(images.shape)
        return images.mean((2, 3))

    model = toy(predict=predict, size_open=True)
    (result,) = evaluate([model], config("imagenet-c", root), run_config(tmp_path))
    assert cells(result) == {f"{name}/{severity}": 6 for name in ("snow", "fog") for severity in range(1, 6)}
    assert {shape[2:] for shape in seen} == {(48, 48)}
    assert result["metrics"]["mean_error"]["corruptions"] == ["snow", "fog"]
    assert result["metrics"]["mce_alexnet"]["value"] is None
    with pytest.raises(DataError, match="has 48×48 pixels, but toy needs 32×32"):
        measure("imagenet-c", root, tmp_path)
    assert cells(measure("imagenet-c", root, tmp_path, resize="fit", only=("fog/2",))) == {"fog/2": 6}
    assert cells(measure("imagenet-c", root, tmp_path, resize="fit", only=("spatter",))).keys() == {
        f"spatter/{severity}" for severity in range(1, 6)
    }


@pytest.mark.parametrize("suite", ["imagenet", "sketch", "stylized", "cifar10"])
def test_published_sets_are_read_without_the_exif_orientation(tmp_path: Path, suite: str) -> None:
    """Every photograph is the wrong way round unless its EXIF orientation is applied."""
    exif = Image.Exif()
    exif[0x0112] = 3
    spec = spec_of(tuple(COLORS), tuple(WNIDS))
    for wnid in WNIDS:
        path = tmp_path / "set" / wnid / "1.png"
        path.parent.mkdir(parents=True)
        picture = np.zeros((32, 32, 3), np.uint8)
        picture[:16] = 255
        Image.fromarray(picture).save(path, exif=exif)
    seen: list[np.ndarray] = []

    def look(images_NHWC: np.ndarray) -> np.ndarray:
        seen.append(images_NHWC)
        return np.zeros((len(images_NHWC), len(COLORS)), np.float32)

    upright = replace(spec, preprocessing=replace(spec.preprocessing, exif="upright"))
    model = Model(name="m", spec=upright, logits=look)
    evaluate([model], config(suite, tmp_path / "set"), run_config(tmp_path))
    is_published = suite not in ("imagenet", "cifar10")
    assert {bool(image[0, 0, 0]) for batch in seen for image in batch} == {is_published}


def test_images_that_are_not_resized_must_have_the_same_size(tmp_path: Path) -> None:
    data = labeled_folder(tmp_path / "set", count=1)
    save(data / "red", "red", 7, size=40)
    with pytest.raises(DataError, match=r"found 32×32 .* and 40×40 \(red/7.png\)"):
        measure("stylized", data, tmp_path)


@pytest.mark.parametrize(("suite", "chosen"), [("imagenet-a", IMAGENET_A), ("imagenet-r", IMAGENET_R)])
def test_only_the_200_classes_of_imagenet_a_and_r_compete(tmp_path: Path, suite: str, chosen: dict[str, int]) -> None:
    """A class outside the 200 has the largest logit, and is not predicted."""
    first, second = list(chosen)[:2]
    outside = next(place for place in range(1000) if place not in chosen.values())
    spec = imagenet_spec()

    def predict(images: np.ndarray) -> np.ndarray:
        logits = np.zeros((len(images), 1000), np.float32)
        logits[:, outside] = 100
        logits[:, chosen[first]] = 1
        return logits

    data = labeled_folder(tmp_path / "set", {first: "red", second: "blue"}, 3)
    clean = labeled_folder(tmp_path / "clean", {first: "red", spec.wnids[outside]: "green"}, 5)
    model = toy(spec=spec, predict=predict)
    (result,) = evaluate([model], config(suite, data, clean=clean), run_config(tmp_path))
    assert cells(result) == {"clean": 5, "images": 6}  # only clean images of the 200 classes
    assert result["metrics"]["cells"]["images"]["top1"] == 0.5
    assert result["metrics"]["cells"]["clean"]["top1"] == 1.0
    assert result["settings"]["classes_asked"] == 200
    (all_classes,) = evaluate([model], config("imagenet", data), run_config(tmp_path))
    assert all_classes["metrics"]["cells"]["images"]["top1"] == 0.0
    with pytest.raises(SpecError, match="lacks 200 of the 200"):
        measure(suite, data, tmp_path)
    with pytest.raises(DataError, match="expected folders named by the WordNet ids of the 200"):
        measure(suite, labeled_folder(tmp_path / "other"), tmp_path, spec)


def test_the_class_lists_equal_timms() -> None:
    from timm.data import ImageNetInfo

    wnids = ImageNetInfo().label_names()
    info = pytest.importorskip("importlib.resources").files("timm.data") / "_info"
    for letter, chosen in (("a", IMAGENET_A), ("r", IMAGENET_R)):
        indices = [int(line) for line in (info / f"imagenet_{letter}_indices.txt").read_text().split()]
        assert sorted(chosen.values()) == indices
        assert {wnids[place]: place for place in indices} == chosen


def test_imagenet_v2_folders_sort_as_numbers(tmp_path: Path) -> None:
    """Sorted as text, 10 would come before 2."""

    def predict(images: np.ndarray) -> np.ndarray:
        return np.eye(1000, dtype=np.float32)[[10] * len(images)]

    data = labeled_folder(tmp_path / "set", {"2": "red", "10": "blue"}, 2)
    model = toy(spec=imagenet_spec(), predict=predict)
    (result,) = evaluate([model], config("imagenet-v2", data), run_config(tmp_path))
    assert result["cells"]["images"]["counts"]["top1"] == 2
    suite = open_suite(config("imagenet-v2", data), imagenet_spec())
    assert set(zip(suite.cells[0].images.names, suite.cells[0].images.labels, strict=True)) == {
        ("2/0.png", 2),
        ("2/1.png", 2),
        ("10/0.png", 10),
        ("10/1.png", 10),
    }
    with pytest.raises(SpecError, match="1,000 classes in the order of their WordNet ids; found 3"):
        measure("imagenet-v2", data, tmp_path)
    with pytest.raises(DataError, match="found red"):
        measure("imagenet-v2", labeled_folder(tmp_path / "w", {"red": "red"}), tmp_path, imagenet_spec())


def cifar_spec(classes: tuple[str, ...] = CIFAR10) -> ModelSpec:
    return spec_of(classes, ())


def cifar_c(root: Path, rows: int = 6) -> Path:
    """Write a set in which severity s has gray level 40 s, and row r has label r % 3."""
    root.mkdir()
    levels = np.repeat(np.arange(1, 6) * 40, rows).astype(np.uint8)
    for name in ("fog", "snow"):
        np.save(root / f"{name}.npy", np.broadcast_to(levels[:, None, None, None], (5 * rows, 32, 32, 3)))
    np.save(root / "labels.npy", np.tile(np.arange(rows) % 3, 5))
    return root


@pytest.mark.parametrize(
    ("classes", "order"),
    [
        (CIFAR10, range(10)),
        (tuple(map(str, range(10))), range(10)),
        (CIFAR10[::-1], range(9, -1, -1)),  # another order: classes are found by name
    ],
)
def test_each_fifth_of_cifar10_c_is_a_severity(tmp_path: Path, classes: tuple[str, ...], order: range) -> None:
    """The model predicts bird (2) above a gray level of 100, from severity 3, else airplane (0)."""

    def predict(images: np.ndarray) -> np.ndarray:
        level = (images * 0.25 + 0.5).mean((1, 2, 3)) * 255
        return np.eye(10, dtype=np.float32)[np.where(level > 100, order[2], order[0])]

    data = cifar_c(tmp_path / "c")
    model = toy(spec=cifar_spec(classes), predict=predict)
    (result,) = evaluate([model], config("cifar10-c", data), run_config(tmp_path))
    assert cells(result) == {f"{name}/{severity}": 6 for name in ("snow", "fog") for severity in range(1, 6)}
    assert all(cell["counts"]["top1"] == 2 for cell in result["cells"].values())
    assert result["metrics"]["mean_error"]["value"] == pytest.approx(2 / 3)
    assert result["metrics"]["mce_alexnet"]["why_not"].startswith("mCE needs ImageNet's 1,000 classes")
    with pytest.raises(SpecError, match="without airplane"):
        measure("cifar10-c", data, tmp_path)


def test_a_limit_draws_the_same_rows_of_cifar10_c_at_every_severity(tmp_path: Path) -> None:
    suite = open_suite(config("cifar10-c", cifar_c(tmp_path / "c"), limit=3), cifar_spec())
    rows = [[int(name) % 6 for name in cell.images.names] for cell in suite.cells]
    assert all(row == rows[0] for row in rows)
    assert sorted(suite.cells[0].images.labels) == [0, 1, 2]


def test_a_damaged_cifar10_c_is_refused(tmp_path: Path) -> None:
    data = cifar_c(tmp_path / "c")
    np.save(data / "labels.npy", np.zeros(7, int))
    with pytest.raises(DataError, match=r"for each of the 30 images of fog.npy.*found int64 \(7,\)|snow.npy"):
        open_suite(config("cifar10-c", data), cifar_spec())
    np.save(data / "labels.npy", np.full(30, 10))
    with pytest.raises(DataError, match="0 to 9; found 10"):
        open_suite(config("cifar10-c", data), cifar_spec())
    (data / "labels.npy").unlink()
    with pytest.raises(DataError, match="no such file"):
        open_suite(config("cifar10-c", data), cifar_spec())
    (data / "fog.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match="is not a complete"):
        open_suite(config("cifar10-c", data, only=("fog",)), cifar_spec())


@pytest.mark.parametrize("suite", SUITES)
def test_an_empty_or_missing_folder_is_an_error(tmp_path: Path, suite: str) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        with pytest.raises(DataError, match="expected"):
            open_suite(config(suite, tmp_path / folder), imagenet_spec())


def test_messages_say_what_to_do(tmp_path: Path) -> None:
    data = labeled_folder(tmp_path / "set" / "val").parent
    (data / "train").mkdir()
    spec = spec_of()
    with pytest.raises(DataError, match=r"Use .*set/val"):
        open_suite(config("imagenet", data), spec)
    with pytest.raises(DataError, match=r"WordNet ids .* which the model does not know"):
        open_suite(config("imagenet", labeled_folder(tmp_path / "w", {"n00000009": "red"})), spec_of(wnids=()))
    with pytest.raises(DataError, match="did you mean red"):
        open_suite(config("imagenet", labeled_folder(tmp_path / "r", {"redd": "red"})), spec)
    with pytest.raises(DataError, match="several classes named 'crane'"):
        open_suite(
            config("imagenet", labeled_folder(tmp_path / "d", {"crane": "red"})), spec_of(("crane", "crane"), ())
        )
    (tmp_path / "hollow" / "red").mkdir(parents=True)
    with pytest.raises(DataError, match="expected image files"):
        open_suite(config("imagenet", tmp_path / "hollow"), spec)
    with pytest.raises(ConfigError, match="did you mean imagenet-c"):
        open_suite(config("imagenetc", data), spec)
    with pytest.raises(ConfigError, match="unknown cell 'fgo/3'; did you mean fog"):
        config("corruptions", data, only=("fgo/3",))
    with pytest.raises(ConfigError, match="has no fog/9"):
        open_suite(config("corruptions", data / "val", only=("fog/9",)), spec)
    with pytest.raises(ConfigError, match="remove --clean"):
        open_suite(config("corruptions", data / "val", clean=data), spec)
    for wrong in ({"limit": 0}, {"table": "mnist"}, {"resize": "crop"}):
        with pytest.raises(ConfigError, match=r"limit must be|severities 'mnist'|found 'crop'"):
            config("imagenet", data, **wrong)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path, workers: int) -> None:
    data = labeled_folder(tmp_path / "set")
    (data / "green" / "3.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"cannot decode .*green/3.png.*; remove or replace the file"):
        evaluate([toy()], config("imagenet", data), run_config(tmp_path, workers=workers))


@pytest.mark.parametrize(("size", "table"), [(32, "cifar"), (64, "tiny"), (224, "imagenet")])
def test_the_table_of_severities_depends_on_the_input_size_of_the_network(
    tmp_path: Path, size: int, table: str
) -> None:
    data = labeled_folder(tmp_path / "set", count=1, size=48)
    assert open_suite(config("corruptions", data), spec_of(size=size)).table == table
    assert open_suite(config("corruptions", data, table="tiny"), spec_of(size=size)).table == "tiny"


def test_a_limit_is_stratified_seeded_and_nested() -> None:
    names = tuple(f"{label}/{number}" for label in range(4) for number in range((1, 10, 30, 60)[label]))
    images = LabeledImages(FolderSource(Path()), names, tuple(int(name[0]) for name in names))
    ten = images.limited(10, 0)
    assert np.bincount(ten.labels, minlength=4).tolist() == [0, 1, 3, 6]
    assert ten.names == tuple(name for name in names if name in set(ten.names))
    fifty = images.limited(50, 0)
    assert np.bincount(fifty.labels).tolist() in ([0, 5, 15, 30], [1, 5, 15, 29], [1, 5, 14, 30], [1, 4, 15, 30])
    assert set(ten.names) < set(fifty.names)
    assert images.limited(10, 0) == ten
    assert images.limited(10, 1) != ten
    assert images.limited(1000, 0) is images
    assert ten.sha256 != images.sha256


def test_gray_images_are_read_as_color_and_other_files_ignored(tmp_path: Path) -> None:
    folder = tmp_path / "set" / "red" / "deeper"
    folder.mkdir(parents=True)
    Image.fromarray(picture("red", 0)[..., 0]).save(folder / "gray.JPEG")
    (folder / "notes.txt").write_text("no image")
    seen: list[np.ndarray] = []

    def predict(images: np.ndarray) -> np.ndarray:
        seen.append(images)
        return images.mean((2, 3))

    (result,) = evaluate([toy(predict=predict)], config("imagenet", tmp_path / "set"), run_config(tmp_path))
    assert cells(result) == {"images": 1}
    (image,) = seen[0]
    assert np.ptp(image) > 0.1  # it has texture
    assert np.array_equal(image[0], image[1]) and np.array_equal(image[0], image[2])


def test_only_selected_corruptions_are_probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, spec = labeled_folder(tmp_path / "set", count=2), spec_of()
    suite = open_suite(config("corruptions", data), spec)
    hide_frost_textures(tmp_path / "site", monkeypatch)
    suite.probe(set(), spec.preprocessing)
    suite.probe({"fog/3", "clean"}, spec.preprocessing)
    with pytest.raises(BackendUnavailable, match=r"imagecorruptions-imaug does not contain .*frost\d\.png"):
        suite.probe({"frost/1"}, spec.preprocessing)
