"""What a report takes in beside accuracy: latencies and attacks, each a small JSON file that any tool can write.

`advprop.bench/1`   one model's latency on one device:
    {"format": …, "model": {"name", "sha256"}, "device": "NVIDIA L4", "backend": "tensorrt 10.9", "batch_size": 1,
     "p50_ms": 1.9, "p99_ms": 2.4}
`advprop.attack/1`  one model's accuracy on attacked images; all points are of the same images:
    {"format": …, "model": {"name", "sha256"}, "images": 200, "names_sha256": …, "seed": 0,
     "curves": [{"attack": "square", "queries": 1000, "points": [{"epsilon": 0.0157, "right": 121}, …]},
                {"attack": "noise", "points": […]}]}
`sha256` is the model file's, as in its evaluations. ε is the largest change of a pixel in [0, 1]. The attack called
`noise` is the control: random changes of the same size. More keys may be there, and are not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import DataError

__all__ = ["ATTACK_FORMAT", "BENCH_FORMAT", "NOISE", "Attack", "Curve", "Latency", "attack_of", "latency_of"]

BENCH_FORMAT = "advprop.bench/1"
ATTACK_FORMAT = "advprop.attack/1"

NOISE = "noise"
"""The attack that is none: the control beside the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """How long one model takes on one device."""

    name: str
    """The model's."""
    sha256: str
    """The model file's."""
    device: str
    backend: str
    batch_size: int
    p50_ms: float
    p99_ms: float | None

    @property
    def place(self) -> str:
        """What must be the same for two latencies to be compared."""
        return f"{self.device}, batch {self.batch_size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One attack at several strengths."""

    attack: str
    queries: int | None
    """Answers of the model that each image cost, at most."""
    points: tuple[tuple[float, int], ...]
    """(ε, images still right), ε rising."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """One model under attack."""

    name: str
    sha256: str
    images: int
    names_sha256: str
    """Hash of the images' names and labels."""
    seed: int | None
    curves: tuple[Curve, ...]


def latency_of(content: Mapping[str, Any], where: str) -> Latency:
    """Reads a latency. Raises DataError where something is missing or impossible."""
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
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(where, BENCH_FORMAT, error) from error
    times = [latency.p50_ms, latency.p50_ms if latency.p99_ms is None else latency.p99_ms]
    if not all(math.isfinite(time) and time > 0 for time in times) or latency.batch_size < 1:
        raise DataError(f"{where}: expected times in milliseconds above 0 and a batch size of at least 1")
    return latency


def attack_of(content: Mapping[str, Any], where: str) -> Attack:
    """Reads an attack. Raises DataError where something is missing or impossible."""
    try:
        attack = Attack(
            name=str(content["model"]["name"]),
            sha256=str(content["model"]["sha256"]),
            images=int(content["images"]),
            names_sha256=str(content["names_sha256"]),
            seed=None if content.get("seed") is None else int(content["seed"]),
            curves=tuple(_curve(curve) for curve in content["curves"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(where, ATTACK_FORMAT, error) from error
    for curve in attack.curves:
        for epsilon, right in curve.points:
            if not (0 <= epsilon <= 1 and 0 <= right <= attack.images):
                raise DataError(
                    f"{where}: ε is from 0 to 1, and 0 to {attack.images} images right; found {epsilon:g} and {right}"
                )
    if attack.images < 1 or not any(curve.points for curve in attack.curves):
        raise DataError(f"{where}: expected at least one image, and a curve with points")
    return attack


def _curve(content: Mapping[str, Any]) -> Curve:
    points = sorted((float(point["epsilon"]), int(point["right"])) for point in content["points"])
    queries = content.get("queries")
    return Curve(attack=str(content["attack"]), queries=None if queries is None else int(queries), points=tuple(points))


def _damaged(where: str, format_: str, error: Exception) -> DataError:
    what = f"no {error.args[0]!r} in it" if isinstance(error, KeyError) else str(error)
    return DataError(f"{where}: expected {format_!r} as runtime/evaluate/report/measured.py describes it; {what}")
