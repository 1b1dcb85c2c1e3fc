"""One folder or a list of images as a dataset, and the record of its division."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from PIL import Image

from runtime.errors import DataError
from runtime.system.image_sources import class_folders, find_images
from train.config import DataConfig
from train.data import ImageData, ImageSet
from train.file_lists import read_list
from train.folders import image_files
from train.split import split_by_class


def write_images(root: Path, **counts: int) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(root / name / f"{number}.png")
    return root


def names(part: object) -> list[str]:
    assert isinstance(part, ImageSet)
    return [part.name(index) for index in range(len(part))]


def parts(data: ImageData) -> tuple[set[str], set[str]]:
    return set(names(data.train)), set(names(data.val))


def test_one_folder_is_split_by_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_images(tmp_path / "photos", cat=20, dog=10, bird=3, one=1)
    with caplog.at_level(logging.INFO):
        data = image_files(DataConfig(root=root))
    assert isinstance(data.val, ImageSet) and isinstance(data.train, ImageSet)
    assert data.classes == ("bird", "cat", "dog", "one")
    assert [list(data.val.labels).count(label) for label in range(4)] == [1, 4, 2, 0]
    train, val = parts(data)
    assert not train & val
    assert len(train | val) == 34
    assert "using 7 of 34 images for validation, 20% of each class (seed 0)" in caplog.text
    assert parts(image_files(DataConfig(root=root))) == (train, val)
    assert parts(image_files(DataConfig(root=root), seed=1)) != (train, val)
    assert len(parts(image_files(DataConfig(root=root, val_share=0.5)))[1]) == 17


def test_the_draw_of_a_class_does_not_depend_on_other_classes() -> None:
    files = {"cat": [f"cat{number}" for number in range(9)], "dog": [f"dog{number}" for number in range(9)]}
    other = {"cat": files["cat"], "a": ["x"]}
    assert split_by_class(files, 0.2, 0).val["cat"] == split_by_class(other, 0.2, 0).val["cat"]


def test_train_without_val_is_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "train", cat=5, dog=5)
    write_images(tmp_path / "test", cat=2, dog=2)
    with caplog.at_level(logging.INFO):
        train, val = parts(image_files(DataConfig(root=tmp_path)))
    assert (len(train), len(val)) == (8, 2)
    assert f"--val-data {tmp_path / 'test'} validates on it" in caplog.text
    train, val = parts(image_files(DataConfig(root=tmp_path, val=tmp_path / "test")))
    assert (len(train), len(val)) == (10, 4)


@pytest.mark.parametrize("name", ["val", "validation", "valid"])
def test_names_of_the_validation_folder(tmp_path: Path, name: str) -> None:
    write_images(tmp_path / "train", cat=3, dog=3)
    write_images(tmp_path / name, cat=1, dog=1)
    data = image_files(DataConfig(root=tmp_path))
    assert all(f"/{name}/" in file for file in names(data.val))
    assert data.split is None


def test_a_recorded_split_is_used_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_images(tmp_path / "photos", cat=10, dog=10)
    data = image_files(DataConfig(root=root))
    assert data.split is not None
    (tmp_path / "run").mkdir()
    data.split.write(tmp_path / "run")
    for number in range(10, 30):
        Image.new("RGB", (8, 8)).save(root / "cat" / f"{number}.png")
    moved = root.rename(tmp_path / "moved")
    with caplog.at_level(logging.WARNING):
        again = image_files(DataConfig(root=moved), seed=5, record=tmp_path / "run" / "split.csv")
    expected = [{file.replace("/photos/", "/moved/") for file in part} for part in parts(data)]
    assert list(parts(again)) == expected
    assert "ignored 20 images that are not in" in caplog.text


def test_the_recorded_parts_are_folders_and_a_list(tmp_path: Path) -> None:
    root = write_images(tmp_path / "photos", cat=10, dog=10)
    data = image_files(DataConfig(root=root))
    assert data.split is not None
    data.split.write(tmp_path)
    assert parts(image_files(DataConfig(root=tmp_path / "split.csv"))) == parts(data)
    found = find_images(tmp_path / "split" / "val", class_folders(tmp_path / "split" / "val"))
    resolved = {str((tmp_path / "split" / "val" / file).resolve()) for files in found.values() for file in files}
    assert resolved == parts(data)[1]
    linked = image_files(DataConfig(root=tmp_path / "split"))
    assert linked.classes == data.classes
    assert len(linked.train) == 16


def test_lists_of_csv_and_json_lines(tmp_path: Path) -> None:
    write_images(tmp_path / "p", cat=3, dog=3)
    rows = [(f"p/{name}/{number}.png", name) for name in ("cat", "dog") for number in range(3)]
    split = ["val" if path.endswith("/2.png") else "train" for path, _ in rows]
    lists = {
        "a.csv": "path,label,split\n" + "".join(f"{p},{c},{s}\n" for (p, c), s in zip(rows, split, strict=True)),
        "b.csv": "﻿Filename;Class;Subset\n" + "".join(f"{p};{c};{s}\n" for (p, c), s in zip(rows, split, strict=True)),
        "c.tsv": "label\timage\tsplit\n" + "".join(f"{c}\t{p}\t{s}\n" for (p, c), s in zip(rows, split, strict=True)),
        "d.jsonl": "".join(
            json.dumps({"file_name": p, "label": c, "split": s}) + "\n" for (p, c), s in zip(rows, split, strict=True)
        ),
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text, "utf-8")
        data = image_files(DataConfig(root=tmp_path / name))
        assert data.classes == ("cat", "dog"), name
        assert names(data.val) == [str(tmp_path / "p" / label / "2.png") for label in ("cat", "dog")], name
        assert len(data.train) == 4
    (tmp_path / "plain.csv").write_text("".join(f"{path},{label}\n" for path, label in rows))
    assert len(image_files(DataConfig(root=tmp_path / "plain.csv")).val) == 2
    assert image_files(DataConfig(root=tmp_path / "plain.csv", val=tmp_path / "a.csv")).classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty; expected lines of path,label"),
        ("a,b\n1,2\n", "found the columns a, b; expected path and label"),
        ("path,label\na.png,\n", "line 2: expected a path and a label; found 'a.png' and ''"),
        ("path,label\nno.png,cat\n", r"1 of 1 image files do not exist: no\.png \(line 2\); paths are relative to"),
        ("path,label\na.png,cat\na.png,dog\n", "line 3: a.png is listed as train and cat, and again as train and dog"),
        ("path,label,split\na.png,cat,train\na.png,cat,val\n", "again as val and cat; remove one"),
        ("path,label,split\na.png,cat,third\n", "split must be train, val or test; found 'third'"),
        ("path,label,split\na.png,cat,val\n", "has no training images"),
        ("path,label\na.png,cat\nb.png,cat\n", "found 2 images in 1 class folders"),
        ("path,label\na.png,cat\nnotes.txt,dog\n", r"lists files that are not images \(\.txt\)"),
    ],
)
def test_unusable_lists_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=expected):
        image_files(DataConfig(root=tmp_path / "list.csv"))


def test_json_lines_that_are_not_objects(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"path": "a.png", "label": "cat"}\n[1]\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: expected an object such as"):
        read_list(tmp_path / "a.jsonl")


def test_all_empty_classes_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_images(tmp_path / "photos", cat=4, dog=4, **{f"empty{number}": 0 for number in range(6)})
    with caplog.at_level(logging.WARNING):
        image_files(DataConfig(root=root))
    assert ", ".join(f"empty{number}" for number in range(6)) in caplog.text
    shutil.rmtree(root)
