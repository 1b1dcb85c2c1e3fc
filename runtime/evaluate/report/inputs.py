"""The files that a report is made of: told apart by their `format`, checked, and shards put together."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import DataError, InputError
from runtime.evaluate.counts import Counts
from runtime.evaluate.report.measured import (
    ATTACK_FORMAT,
    BENCH_FORMAT,
    Attack,
    Latency,
    attack_of,
    latency_of,
)
from runtime.evaluate.results import FORMAT, Result, finished, is_whole, merge

__all__ = ["Inputs", "read_inputs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What was read."""

    results: tuple[Result, ...]
    """One a model and suite, each whole."""
    latencies: tuple[Latency, ...] = ()
    attacks: tuple[Attack, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    """Name and SHA-256 of every file."""


def read_inputs(paths: Sequence[Path]) -> Inputs:
    """Reads results of evaluations, latencies and attacks.

    Shards and cells of one evaluation are put together; a file that is there twice counts once.

    Raises:
        DataError: a file that is none of these, or damaged; parts that do not make a whole; no result at all.
    """
    files: dict[str, str] = {}
    results: dict[tuple[str, str], list[tuple[str, Result]]] = defaultdict(list)
    latencies, attacks = [], []
    for path in paths:
        content, sha256 = _content(path)
        if sha256 in files.values():
            continue
        files[str(path)] = sha256
        if content["format"] == BENCH_FORMAT:
            latencies.append(latency_of(content, str(path)))
        elif content["format"] == ATTACK_FORMAT:
            attacks.append(attack_of(content, str(path)))
        else:
            result = _checked(content, path)
            results[json.dumps(result["model"], sort_keys=True), result["suite"]].append((str(path), result))
    if not results:
        raise DataError("a report is made of results of advprop eval (MODEL.SUITE.json); found none of them")
    return Inputs(
        results=tuple(_whole(parts) for parts in results.values()),
        latencies=tuple(latencies),
        attacks=tuple(attacks),
        files=tuple(files.items()),
    )


def _content(path: Path) -> tuple[dict[str, Any], str]:
    known = f"{FORMAT!r} (advprop eval), {BENCH_FORMAT!r} or {ATTACK_FORMAT!r}"
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; expected a result of advprop eval") from error
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); expected a file of format {known}") from error
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found not in (FORMAT, BENCH_FORMAT, ATTACK_FORMAT):
        newer = isinstance(found, str) and found.rpartition("/")[0] == FORMAT.rpartition("/")[0]
        why = "; it was written by another version of advprop: evaluate again with this one" if newer else ""
        raise DataError(f"{path}: expected a file of format {known}; found {found!r}{why}")
    return content, hashlib.sha256(raw).hexdigest()


def _checked(content: dict[str, Any], path: Path) -> Result:
    """The result with metrics made anew from its counts, so that the two cannot contradict each other."""
    try:
        result = finished(content)
        for cell in result["cells"].values():
            if Counts.from_dict(cell["counts"]).images < 1 and is_whole(result):
                raise ValueError("a cell without images")
            str(cell["names_sha256"]), str(cell["resize"])
        result["model"]["name"], result["model"]["classes"], result["data"]["path"], dict(result["versions"])
        for key in ("seed", "limit", "classes_asked", "batch_size", "preprocessing"):
            result["settings"][key]
        if result["reference"] is not None:
            str(result["reference"]["name"])
        if not isinstance(result["suite"], str) or not result["cells"]:
            raise ValueError("no suite, or no cells")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        what = f"no {error.args[0]!r} in it" if isinstance(error, KeyError) else error
        raise DataError(
            f"{path} says {FORMAT!r}, but is damaged or changed by hand ({what}); evaluate again"
        ) from error
    return result


def _whole(parts: list[tuple[str, Result]]) -> Result:
    """One model on one suite, of however many files."""
    names = ", ".join(name for name, _ in parts)
    try:
        result = parts[0][1] if len(parts) == 1 else merge([part for _, part in parts])
    except InputError as error:
        raise DataError(f"{names} are of the same model and suite, but do not go together: {error}") from error
    if not is_whole(result):
        found = sorted({part for cell in result["cells"].values() for part in cell["parts"]})
        raise DataError(f"{names}: only parts {', '.join(found)} of an evaluation; give all of its files")
    return result
