"""Results of evaluations: one JSON file per model and suite.

A result contains counts and everything that they depend on. It does not contain the time, the order
or the number of processes of its computation, so merged shards equal a single run byte for byte.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import DataError
from runtime.evaluate.cells import CLEAN, IMAGES, NAMES, SuiteConfig
from runtime.evaluate.corruptions import CORRUPTIONS, EXTRAS
from runtime.evaluate.counts import Counts
from runtime.evaluate.labels import has_imagenet_classes
from runtime.evaluate.metrics import adapted_names, summarize
from runtime.evaluate.models import Model
from runtime.evaluate.suites import Suite
from runtime.system.files import write_text

__all__ = [
    "FORMAT",
    "Result",
    "check_result",
    "dataset_name",
    "describe",
    "describe_model",
    "difference",
    "finished",
    "is_whole",
    "library_versions",
    "merge",
    "read_result",
    "result_path",
    "write_result",
]

log = logging.getLogger(__name__)

FORMAT = "advprop.evaluation/1"

_WHOLE = ("1/1",)
"""The `parts` of a cell that includes all shards."""

Result = dict[str, Any]


def describe(
    model: Model, reference: Model | None, suite: Suite, config: SuiteConfig, batch_size: int, shard: str
) -> Result:
    """Return a result without counts: everything that they depend on, as plain values."""
    return {
        "format": FORMAT,
        "suite": suite.name,
        "model": describe_model(model),
        "reference": None if reference is None else describe_model(reference),
        "data": {
            "path": str(config.data),
            "clean": None if config.clean is None else str(config.clean),
            "skipped": list(suite.skipped),
            "named_by": suite.named_by,
        },
        "settings": {
            "seed": suite.seed,
            "limit": config.limit,
            **({"adapt": list(config.adapt)} if config.adapt else {}),
            "table": suite.table,
            "classes_asked": len(suite.classes or model.spec.classes),
            "imagenet_classes": has_imagenet_classes(model.spec),
            "batch_size": batch_size,
            "preprocessing": {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in model.spec.preprocessing.to_dict().items()
            },
        },
        "versions": library_versions(model, corruptions=suite.table is not None),
        "cells": {
            cell.id: {
                "images": len(cell.images),
                "names_sha256": cell.images.sha256,
                "resize": cell.resize,
                "parts": [shard],
            }
            for cell in suite.cells
        },
    }


def describe_model(model: Model) -> dict[str, Any]:
    """Return the facts about a model that results record."""
    return {"name": model.name, "classes": len(model.spec.classes), **model.facts}


def library_versions(model: Model, *, corruptions: bool = False) -> dict[str, str]:
    """Return the versions of the libraries that the counts depend on."""
    import PIL

    found = {"advprop": _installed("advprop"), "numpy": np.__version__, "pillow": PIL.__version__}
    if model.facts.get("backend") == "onnxruntime":
        found["onnxruntime"] = _installed("onnxruntime-gpu") or _installed("onnxruntime")
    if corruptions:
        import cv2
        import scipy

        found |= {"opencv": cv2.__version__, "scipy": scipy.__version__}
    return found


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return the first difference, such as "model.sha256 is 'a' instead of 'b'", or ""."""
    for key in dict.fromkeys([*other, *one]):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            inner = difference(a, b)
            if inner:
                return f"{key}.{inner}"
        elif a != b:
            return f"{key} is {a!r} instead of {b!r}"
    return ""


def finished(result: Result) -> Result:
    """Return a result with its cells sorted, and with metrics if all cells include all shards."""
    order = {name: place for place, name in enumerate((CLEAN, IMAGES, *CORRUPTIONS, *EXTRAS))}

    def place(cell: str) -> tuple[int, str]:
        name, _, severity = cell.partition("/")
        return order[name], severity

    cells = {name: result["cells"][name] for name in sorted(result["cells"], key=place)}
    whole = all(tuple(cell["parts"]) == _WHOLE for cell in cells.values())
    counts = {name: Counts.from_dict(cell["counts"]) for name, cell in cells.items()}
    metrics = summarize(counts, why_no_mce=_why_no_mce(result)) if whole else None
    if metrics is not None and "field_images" in result["model"]:
        metrics = adapted_names(metrics, int(result["model"]["field_images"]))
    return {
        **{key: result[key] for key in result if key not in ("cells", "metrics")},
        "cells": cells,
        "metrics": metrics,
    }


def dataset_name(result: Mapping[str, Any], key: str = "path") -> str:
    """Return the last two parts of a test set's folder, such as `photos/val`; "" without a folder."""
    parts = str(result["data"].get(key) or "").replace("\\", "/").split("/")
    return "/".join([part for part in parts if part not in ("", ".", "..")][-2:])


def is_whole(result: Result) -> bool:
    """Return whether the result includes all shards."""
    return result["metrics"] is not None


def _why_no_mce(result: Result) -> str:
    """Return why a result cannot be compared with AlexNet; "" if it can."""
    settings = result["settings"]
    advice = "" if result["reference"] else ". --reference MODEL gives an mCE relative to that model"
    if not settings["imagenet_classes"]:
        return (
            "mCE needs ImageNet's 1,000 classes, for which AlexNet's errors are known; the model has other classes"
            f"{advice}"
        )
    if result["data"].get("named_by") == NAMES:
        return (
            "mCE needs ImageNet's images, for which AlexNet's errors are known; the folders of these are not named by "
            f"WordNet ids{advice}"
        )
    if settings["table"] not in (None, "imagenet"):
        return (
            f"mCE needs ImageNet's table of severities, for which AlexNet's errors are known; found {settings['table']}"
        )
    return ""


def result_path(model: Mapping[str, Any], folder: Path, suffix: str) -> Path:
    """Return the path for a model's result.

    It is `NAME.SUFFIX`. If that file is the result of another model file, such as of an earlier
    training with the same name, it is `NAME-2.SUFFIX`, and so on: a result that took hours must not
    be overwritten.
    """
    first = folder / f"{model['name']}.{suffix}"
    for number in itertools.count(1):
        path = first if number == 1 else folder / f"{model['name']}-{number}.{suffix}"
        if _model_hash(path) in (None, model["sha256"]):
            break
    if path != first:
        log.warning("%s is the result of another model file; writing this result to %s", first, path.name)
    return path


def _model_hash(path: Path) -> str | None:
    """Return the hash of the model whose result `path` holds; None if it holds no result."""
    try:
        return str(json.loads(path.read_text())["model"]["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_result(path: Path, result: Result) -> None:
    """Write a result; equal results are written as equal bytes.

    Raises:
        OutputError: `path` cannot be written.
    """
    write_text(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def read_result(path: Path) -> Result:
    """Read a result.

    Raises:
        DataError: the file does not exist, is damaged, or is not a result of this version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected the result of an evaluation ({error})") from error
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != FORMAT:
        raise DataError(f"{path}: expected the result of an evaluation, format {FORMAT!r}; found {found!r}")
    return check_result(content, path)


def check_result(content: dict[str, Any], path: Path) -> Result:
    """Return the result in a file of format FORMAT, with its metrics recomputed from its counts.

    Raises:
        DataError: a value is missing or invalid.
    """
    try:
        result = finished(content)
        for cell in result["cells"].values():
            if Counts.from_dict(cell["counts"]).images < 1 and is_whole(result):
                raise ValueError("a cell without images")
            _check_types(cell, names_sha256=str, resize=str, images=int)
            if not all(re.fullmatch(r"[0-9]{1,9}/[0-9]{1,9}", part) for part in cell["parts"]):
                raise ValueError("parts must be numbers such as 1/4")
        _check_types(result, suite=str, settings=dict, versions=dict)
        _check_types(result["model"], name=str, classes=int)
        _check_types(result["data"], path=str, clean=str | None, skipped=list)
        _check_types(result["settings"], seed=int, limit=int | None, table=str | None, preprocessing=dict)
        _check_types(result["settings"], classes_asked=int, imagenet_classes=bool, batch_size=int)
        if result["reference"] is not None:
            _check_types(result["reference"], name=str)
        if not result["cells"]:
            raise ValueError("no cells")
        texts = (*result["data"]["skipped"], *filter(None, result["versions"].values()))
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("skipped folders and versions must be text")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        what = f"missing {error.args[0]!r}" if isinstance(error, KeyError) else error
        raise DataError(
            f"{path} has format {FORMAT!r}, but it is damaged or was edited ({what}); evaluate again"
        ) from error
    return result


def _check_types(content: Mapping[str, Any], **types: Any) -> None:
    """Raise KeyError or TypeError unless each key has a value of its type."""
    for key, expected in types.items():
        value = content[key]
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            raise TypeError(f"{key} is a {type(value).__name__}")


def merge(results: Sequence[Result]) -> Result:
    """Merge the shards and cells of one evaluation.

    Args:
        results: results of the same model, suite and settings, in any order, without overlap.

    Raises:
        DataError: the results belong to different evaluations or overlap.
    """
    if not results:
        raise DataError("expected results to merge; found none")
    first = results[0]
    for other in results[1:]:
        _check_same(first, other)
    cells: dict[str, Any] = {}
    for result in results:
        for name, cell in result["cells"].items():
            cells[name] = _merge_cells(name, cells[name], cell) if name in cells else cell
    data = first["data"] | {
        "path": min(result["data"]["path"] for result in results),
        "clean": min((result["data"]["clean"] for result in results), key=str),
        "skipped": sorted({name for result in results for name in result["data"]["skipped"]}),
    }
    return finished(first | {"data": data, "cells": cells})


def _check_same(first: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    for key in ("format", "suite", "model", "reference", "settings", "versions"):
        if first[key] != other[key]:
            raise DataError(
                f"cannot merge results of different evaluations: {difference({key: other[key]}, {key: first[key]})}"
            )


def _merge_cells(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("images", "names_sha256", "resize"):
        if one[key] != other[key]:
            raise DataError(
                f"cannot merge the cell {name}: two results have different images ({key}: {one[key]!r} and "
                f"{other[key]!r})"
            )
    parts = [*one["parts"], *other["parts"]]
    shards = {part.split("/")[1] for part in parts}
    if len(set(parts)) < len(parts) or len(shards) > 1:
        raise DataError(f"cannot merge the cell {name}: two results overlap (parts {', '.join(parts)})")
    counts = Counts.from_dict(one["counts"]) + Counts.from_dict(other["counts"])
    return {**one, "parts": _merge_parts(parts), "counts": _plain(counts)}


def _merge_parts(parts: Iterable[str]) -> list[str]:
    ordered = sorted(parts, key=lambda part: int(part.split("/")[0]))
    return list(_WHOLE) if len(ordered) == int(ordered[0].split("/")[1]) else ordered


def _plain(counts: Counts) -> dict[str, Any]:
    """Return counts as after a round trip through JSON, which makes results comparable."""
    plain: dict[str, Any] = json.loads(json.dumps(counts.to_dict()))
    return plain
