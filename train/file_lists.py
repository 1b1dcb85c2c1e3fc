"""Read and write lists of images: CSV or JSON-lines files with a path, a label and optionally a split.

    path,label,split                {"path": "a.jpg", "label": "cat"}
    a.jpg,cat,train                 {"path": "b.jpg", "label": "dog"}
    b.jpg,dog,val

Paths are relative to the folder of the list. Column names of other tools (`filename`, `class`, …)
are understood. A CSV file without a header has the columns path and label.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import DataError, first_line
from runtime.system.files import write_text
from runtime.system.image_sources import is_image_name

__all__ = ["TRAIN", "VAL", "FileList", "is_list", "read_list", "write_list"]

TRAIN, VAL = "train", "val"
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
_COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img"),
    "label": ("label", "labels", "class", "class_name", "classname", "target", "category", "label_name"),
    "split": ("split", "subset", "part", "set"),
}
_SPLITS = {"": TRAIN, "train": TRAIN, "training": TRAIN} | dict.fromkeys(("val", "valid", "validation", "dev"), VAL)
_UNUSED_SPLIT = "test"


@dataclass(frozen=True, slots=True)
class FileList:
    """Image files by class, in the order of the list."""

    train: dict[str, list[str]]
    """Paths of the training images by class."""
    val: dict[str, list[str]]
    """Paths of the validation images by class; empty if the list has no split."""
    unused: int
    """Number of images of the split `test`."""


def is_list(path: Path) -> bool:
    """Return whether the name of a path is that of a list of images."""
    return path.suffix.lower() in _SUFFIXES and not path.is_dir()


def read_list(path: Path, *, check_files: bool = True) -> FileList:
    """Read a list of images.

    Args:
        path: a `.csv`, `.tsv`, `.jsonl` or `.ndjson` file.
        check_files: whether each image file must exist.

    Raises:
        DataError: the list cannot be read, has no columns for path and label, has an incomplete or
            contradictory row, or names a file that does not exist.
    """
    found: dict[str, tuple[str, str]] = {}
    missing: list[str] = []
    unused = 0
    for line, row in _rows(path):
        name, label = (str(row.get(column) or "").strip() for column in ("path", "label"))
        label = str(row["label"]) if isinstance(row.get("label"), int) else label
        split = str(row.get("split") or "").strip().lower()
        if not name or not label:
            raise DataError(f"{path}, line {line}: expected a path and a label; found {name!r} and {label!r}")
        if split == _UNUSED_SPLIT:
            unused += 1
            continue
        if split not in _SPLITS:
            raise DataError(f"{path}, line {line}: split must be train, val or test; found {split!r}")
        file = os.path.normpath(path.absolute().parent / Path(name).expanduser())
        entry = (_SPLITS[split], label)
        if found.setdefault(file, entry) != entry:
            raise DataError(
                f"{path}, line {line}: {name} is listed as {' and '.join(found[file])}, and again as "
                f"{' and '.join(entry)}",
                fix="remove one of the two lines",
            )
        if check_files and not Path(file).is_file():
            missing.append(f"{name} (line {line})")
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(found)} image files do not exist: {', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}",
            fix=f"paths are relative to {path.absolute().parent}; correct them, or remove the lines",
        )
    parts: dict[str, dict[str, list[str]]] = {TRAIN: {}, VAL: {}}
    for file, (part, label) in found.items():
        parts[part].setdefault(label, []).append(file)
    return FileList(parts[TRAIN], parts[VAL], unused)


def write_list(path: Path, parts: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
    """Write a CSV file of absolute paths, labels and splits, atomically.

    Args:
        path: the file.
        parts: split → class → paths.

    Raises:
        OutputError: `path` cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "label", "split"))
    for part, classes in parts.items():
        for label, files in classes.items():
            writer.writerows((str(Path(file).absolute()), label, part) for file in files)
    write_text(path, text.getvalue())


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, values by our column names) of each row."""
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read the list of images {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({first_line(error)})", fix="save it as UTF-8") from error
    rows = _json_rows(path, text) if path.suffix.lower() in (".jsonl", ".ndjson") else _csv_rows(path, text)
    for line, row in rows:
        yield line, {_our_column(str(name)): value for name, value in row.items()}


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(text.splitlines(), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {line}: not JSON: {first_line(error)}") from error
        if not isinstance(row, dict):
            raise DataError(f'{path}, line {line}: expected an object such as {{"path": "a.jpg", "label": "cat"}}')
        yield line, row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    head = text.partition("\n")[0]
    delimiter = max("\t;,", key=head.count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    if not rows:
        raise DataError(f"{path} is empty; expected lines of path,label")
    header = [cell.strip() for cell in rows[0][1]]
    if {"path", "label"} <= set(map(_our_column, header)):
        rows = rows[1:]
    elif len(header) == 2 and is_image_name(header[0].replace("\\", "/").lstrip("./")):
        header = ["path", "label"]
    else:
        raise DataError(
            f"{path}: found the columns {', '.join(header)[:200]}; expected path and label, and optionally split"
        )
    for line, row in rows:
        yield line, dict(zip(header, row, strict=False))


def _our_column(name: str) -> str:
    """Return path, label or split for a known name of that column, and other names unchanged."""
    lowered = name.strip().lower()
    return next((ours for ours, names in _COLUMNS.items() if lowered in names), name)
