"""Results of evaluations: one JSON a model and suite, whose cells hold counts, so that results can be put together.

Nothing in a result depends on when, in what order, or in how many processes it was made: two shards put together are
the bytes of one run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import DataError
from runtime.evaluate.corruptions import CORRUPTIONS, EXTRAS
from runtime.evaluate.counts import Counts
from runtime.evaluate.summary import summarize
from runtime.system.files import write_text

__all__ = ["FORMAT", "finished", "is_whole", "merge", "name_for", "read_result", "write_result"]

log = logging.getLogger(__name__)

FORMAT = "advprop.evaluation/1"

WHOLE = ("1/1",)
"""The parts of a cell that no shard is missing of."""

Result = dict[str, Any]


def finished(result: Result) -> Result:
    """Returns a result with its cells in their order, and with metrics where every cell is whole."""
    order = {name: place for place, name in enumerate(("clean", "images", *CORRUPTIONS, *EXTRAS))}

    def place(cell: str) -> tuple[int, str]:
        name, _, severity = cell.partition("/")
        return order[name], severity

    cells = {name: result["cells"][name] for name in sorted(result["cells"], key=place)}
    whole = all(tuple(cell["parts"]) == WHOLE for cell in cells.values())
    counts = {name: Counts.from_dict(cell["counts"]) for name, cell in cells.items()}
    metrics = summarize(counts, why_no_mce=_why_no_mce(result)) if whole else None
    return {
        **{key: result[key] for key in result if key not in ("cells", "metrics")},
        "cells": cells,
        "metrics": metrics,
    }


def is_whole(result: Result) -> bool:
    """Whether no shard of it is missing."""
    return result["metrics"] is not None


def _why_no_mce(result: Result) -> str:
    """Why AlexNet's errors are no yardstick for a result; "" where they are one."""
    settings = result["settings"]
    if not settings["imagenet_classes"]:
        return "AlexNet's errors are of ImageNet's 1,000 classes, and the model has others"
    if settings["table"] not in (None, "imagenet"):
        return f"AlexNet's errors are under ImageNet's table of severities, not {settings['table']}'s"
    return ""


def name_for(model: Mapping[str, Any], folder: Path, ending: str) -> Path:
    """Returns where a model's result goes: `NAME.ENDING`, or with its hash where another file's result is there.

    Exports are all called `model`; what took hours must not go because another of them is measured.
    """
    path = folder / f"{model['name']}.{ending}"
    try:
        found = json.loads(path.read_text())["model"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return path
    if found == model["sha256"]:
        return path
    own = folder / f"{model['name']}-{model['sha256'][:8]}.{ending}"
    log.warning("%s is of another model file: this one's result goes to %s", path, own.name)
    return own


def write_result(path: Path, result: Result) -> None:
    """Writes a result: equal results, equal bytes. Raises OutputError."""
    write_text(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def read_result(path: Path) -> Result:
    """Reads what `write_result` wrote.

    Raises:
        DataError: no such file, or no result of this version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected the result of an evaluation ({error})") from error
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != FORMAT:
        raise DataError(f"{path}: expected the result of an evaluation, format {FORMAT!r}; found {found!r}")
    result: Result = content
    return result


def merge(results: Sequence[Result]) -> Result:
    """Puts shards and cells of one evaluation together.

    Args:
        results: of the same model, suite and settings, in any order. No part may be there twice.

    Raises:
        DataError: results of different evaluations, or parts that overlap.
    """
    if not results:
        raise DataError("no results to put together")
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
                f"results of different evaluations cannot be put together: their {key} differ: "
                f"{_difference(first[key], other[key])}"
            )


def _difference(a: Any, b: Any) -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        key = next(key for key in sorted({*a, *b}) if a.get(key) != b.get(key))
        return f"{key} {a.get(key)!r} and {b.get(key)!r}"
    return f"{a!r} and {b!r}"


def _merge_cells(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("images", "names_sha256", "resize"):
        if one[key] != other[key]:
            raise DataError(f"the cell {name} is of other images in two results: {key} {one[key]!r} and {other[key]!r}")
    parts = [*one["parts"], *other["parts"]]
    shards = {part.split("/")[1] for part in parts}
    if len(set(parts)) < len(parts) or len(shards) > 1:
        raise DataError(f"the cell {name} is in two results that overlap: parts {', '.join(parts)}")
    counts = Counts.from_dict(one["counts"]) + Counts.from_dict(other["counts"])
    return {**one, "parts": _whole_or(parts), "counts": _plain(counts)}


def _whole_or(parts: Iterable[str]) -> list[str]:
    ordered = sorted(parts, key=lambda part: int(part.split("/")[0]))
    return list(WHOLE) if len(ordered) == int(ordered[0].split("/")[1]) else ordered


def _plain(counts: Counts) -> dict[str, Any]:
    """Counts as JSON reads them, so that what was read equals what was made."""
    plain: dict[str, Any] = json.loads(json.dumps(counts.to_dict()))
    return plain
