"""Read the files of a report: results of evaluations, latencies and attacks.

Latencies and attacks are small JSON files that any tool can write:

`advprop.bench/1`   latency of one model on one device:
    {"format": …, "model": {"name", "sha256"}, "device": "NVIDIA L4", "backend": "tensorrt 10.9",
     "batch_size": 1, "p50_ms": 1.9, "p99_ms": 2.4}
`advprop.attack/1`  accuracy of one model on attacked images; all points use the same images:
    {"format": …, "model": {"name", "sha256"}, "images": 200, "names_sha256": …, "seed": 0,
     "curves": [{"attack": "square", "queries": 1000,
                 "points": [{"epsilon": 0.0157, "right": 121}, …]},
                {"attack": "noise", "points": […]}]}

`sha256` is the hash of the model file, as in results of evaluations. `epsilon` is the maximum
change of a pixel in [0, 1]. The attack `noise` is the control: random changes of the same size.
Other keys are ignored.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import DataError, InputError
from runtime.evaluate.attacks.results import ATTACK_FORMAT
from runtime.evaluate.results import FORMAT, Result, check_result, is_whole, merge

__all__ = ["Attack", "Curve", "Inputs", "Latency", "attack_of", "latency_of", "read_inputs", "read_json"]

_BENCH_FORMAT = "advprop.bench/1"
_BENCH_RUN_FORMAT = "advprop.benchrun/1"
"""All measurements of a run of advprop bench; its report files repeat the latencies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Latency of one model on one device."""

    name: str
    """Name of the model."""
    sha256: str
    """Hash of the model file."""
    device: str
    backend: str
    batch_size: int
    p50_ms: float
    p99_ms: float | None

    @property
    def setting(self) -> str:
        """Device and batch size, which must be equal for two latencies to be compared."""
        return f"{self.device}, batch {self.batch_size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One attack at several strengths."""

    attack: str
    queries: int | None
    """Maximum number of queries per image."""
    points: tuple[tuple[float, int], ...]
    """(ε, images that are still classified correctly), with increasing ε."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """Attacks on one model."""

    name: str
    sha256: str
    images: int
    names_sha256: str
    """Hash of the images' names and labels."""
    seed: int | None
    curves: tuple[Curve, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The content of all input files."""

    results: tuple[Result, ...]
    """One result per model and suite, each with all of its shards."""
    latencies: tuple[Latency, ...] = ()
    attacks: tuple[Attack, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    """Name and SHA-256 of every file."""


def read_inputs(paths: Sequence[Path]) -> Inputs:
    """Read results of evaluations, latencies and attacks.

    Shards and cells of the same evaluation are merged. A file that is passed twice counts once.

    Raises:
        DataError: a file has an unsupported format or is damaged, or results or shards are missing.
    """
    files: dict[str, str] = {}
    results: dict[tuple[str, str], list[tuple[str, Result]]] = defaultdict(list)
    latencies, attacks = [], []
    for path in paths:
        content, sha256 = read_json(path)
        if sha256 in files.values() or content["format"] == _BENCH_RUN_FORMAT:
            continue
        files[str(path)] = sha256
        if content["format"] == _BENCH_FORMAT:
            latencies.append(latency_of(content, str(path)))
        elif content["format"] == ATTACK_FORMAT:
            attacks.append(attack_of(content, str(path)))
        else:
            result = check_result(content, path)
            results[json.dumps(result["model"], sort_keys=True), result["suite"]].append((str(path), result))
    if not results:
        raise DataError("a report needs results of advprop eval (MODEL.SUITE.json); found none")
    return Inputs(
        results=tuple(_merge_results(parts) for parts in results.values()),
        latencies=tuple(latencies),
        attacks=tuple(attacks),
        files=tuple(files.items()),
    )


def read_json(path: Path) -> tuple[dict[str, Any], str]:
    """Return a file's content and SHA-256.

    Raises:
        DataError: the file has none of the formats of a report.
    """
    known = f"{FORMAT!r} (advprop eval), {_BENCH_FORMAT!r} or {ATTACK_FORMAT!r}"
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; expected a result of advprop eval") from error
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); expected a file of format {known}") from error
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found not in (FORMAT, _BENCH_FORMAT, _BENCH_RUN_FORMAT, ATTACK_FORMAT):
        other_version = isinstance(found, str) and found.rpartition("/")[0] == FORMAT.rpartition("/")[0]
        hint = "; another version of advprop wrote it: evaluate again with this version" if other_version else ""
        raise DataError(f"{path}: expected a file of format {known}; found {found!r}{hint}")
    return content, hashlib.sha256(raw).hexdigest()


def _merge_results(parts: list[tuple[str, Result]]) -> Result:
    """Return the result of one model on one suite from any number of files."""
    if any(part["reference"] for _, part in parts):
        # The same evaluation without a reference says nothing more.
        parts = [(name, part) for name, part in parts if part["reference"]]
    names = ", ".join(name for name, _ in parts)
    try:
        result = parts[0][1] if len(parts) == 1 else merge([part for _, part in parts])
    except InputError as error:
        raise DataError(f"{names} have the same model and suite, but cannot be merged: {error}") from error
    if not is_whole(result):
        found = sorted({part for cell in result["cells"].values() for part in cell["parts"]})
        raise DataError(f"{names}: found only shards {', '.join(found)} of an evaluation; pass all of its files")
    return result


def latency_of(content: Mapping[str, Any], where: str) -> Latency:
    """Return the latency in a file.

    Raises:
        DataError: a value is missing or invalid.
    """
    try:
        latency = Latency(
            name=str(content["model"]["name"]),
            sha256=str(content["model"]["sha256"]),
            device=str(content["device"]),
            backend=str(content["backend"]),
            batch_size=int(content["batch_size"]),
            p50_ms=float(content["p50_ms"]),
            p99_ms=None if content.get("p99_ms") is None else float(content["p99_ms"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _invalid(where, _BENCH_FORMAT, error) from error
    times = [latency.p50_ms, latency.p50_ms if latency.p99_ms is None else latency.p99_ms]
    if not all(math.isfinite(time) and time > 0 for time in times) or latency.batch_size < 1:
        raise DataError(f"{where}: expected times in milliseconds above 0 and a batch size of at least 1")
    return latency


def attack_of(content: Mapping[str, Any], where: str) -> Attack:
    """Return the attacks in a file.

    Raises:
        DataError: a value is missing or invalid.
    """
    try:
        attack = Attack(
            name=str(content["model"]["name"]),
            sha256=str(content["model"]["sha256"]),
            images=int(content["images"]),
            names_sha256=str(content["names_sha256"]),
            seed=None if content.get("seed") is None else int(content["seed"]),
            curves=tuple(_curve(curve) for curve in content["curves"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _invalid(where, ATTACK_FORMAT, error) from error
    for curve in attack.curves:
        for epsilon, right in curve.points:
            if not (0 <= epsilon <= 1 and 0 <= right <= attack.images):
                raise DataError(
                    f"{where}: expected ε from 0 to 1 and 0 to {attack.images} correct images; found {epsilon:g} and "
                    f"{right}"
                )
    if attack.images < 1 or not any(curve.points for curve in attack.curves):
        raise DataError(f"{where}: expected at least one image, and a curve with points")
    return attack


def _curve(content: Mapping[str, Any]) -> Curve:
    points = sorted((float(point["epsilon"]), int(point["right"])) for point in content["points"])
    queries = content.get("queries")
    return Curve(attack=str(content["attack"]), queries=None if queries is None else int(queries), points=tuple(points))


def _invalid(where: str, format_: str, error: Exception) -> DataError:
    what = f"missing {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
    return DataError(f"{where}: expected format {format_!r}, which docs/how-to/report.md describes ({what})")
