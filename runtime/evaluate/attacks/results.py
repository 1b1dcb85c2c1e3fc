"""The result of attacks on one model: `advprop.attack/1`.

`runtime.evaluate.report.inputs` describes the keys that a report needs; results have more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.evaluate.attacks.config import CLEAN, NOISE, SQUARE, AttackConfig
from runtime.evaluate.attacks.methods import Attacker
from runtime.evaluate.attacks.target import radius_of
from runtime.evaluate.images import LabeledImages
from runtime.evaluate.models import Model
from runtime.evaluate.results import describe_model, library_versions

__all__ = ["ATTACK_FORMAT", "WORST", "AttackResult", "Key", "Outcomes", "describe_attack", "result_of"]

ATTACK_FORMAT = "advprop.attack/1"

WORST = "worst"
"""Name of the curve of images on which every attack fails. Noise is the control and does not
count."""

AttackResult = dict[str, Any]

Key = tuple[str, float, int]
"""Attack, ε in 1/255, and the number of a block of images."""

Outcomes = dict[str, tuple[NDArray[np.bool_], NDArray[np.int64]]]
"""Model → images that are still classified correctly, (N,), and queries per image, (N,)."""


def describe_attack(
    model: Model, attacker: Attacker | None, images: LabeledImages, config: AttackConfig, data: Mapping[str, Any]
) -> AttackResult:
    """Return a result without curves: everything that the curves depend on, as plain values."""
    return {
        "format": ATTACK_FORMAT,
        "model": describe_model(model),
        "checkpoint": None if attacker is None else {"name": attacker.name, **attacker.facts},
        "images": len(images),
        "names_sha256": images.sha256,
        "seed": config.seed,
        "data": dict(data),
        "settings": {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(config).items()
            if key != "seed"
        },
        "versions": library_versions(model),
    }


def result_of(
    description: AttackResult, name: str, attacks: Sequence[str], blocks: Sequence[int], done: Mapping[Key, Outcomes]
) -> AttackResult:
    """Return a model's result, with a curve per attack and a curve for the worst attack per image.

    Args:
        description: what `describe_attack` returned.
        name: the model's name in the outcomes.
        attacks: attacks that ran on the model.
        blocks: numbers of all blocks.
        done: outcomes of all attacks and blocks.
    """
    settings, checkpoint = description["settings"], description["checkpoint"]
    epsilons = settings["epsilons"]

    def gather(attack: str, epsilon: float) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        parts = [done[attack, epsilon, block][name] for block in blocks]
        return np.concatenate([right for right, _ in parts]), np.concatenate([queries for _, queries in parts])

    clean_N, _ = gather(CLEAN, 0.0)
    zero = _point(0.0, clean_N, clean_N, None)
    found = {attack: [gather(attack, epsilon) for epsilon in epsilons] for attack in attacks}
    curves = []
    for attack, values in found.items():
        points = [
            _point(eps, right_N, clean_N, queries_N) for eps, (right_N, queries_N) in zip(epsilons, values, strict=True)
        ]
        budget = {SQUARE: settings["queries"], NOISE: settings["draws"]}.get(attack)
        curve: dict[str, Any] = {
            "attack": attack,
            "queries": budget or max(int(queries_N.max()) for _, queries_N in values),
        }
        if budget is None:
            white_box = checkpoint["sha256"] == description["model"].get("sha256")
            own = white_box or checkpoint["sha256"] == description["model"].get("checkpoint_sha256")
            curve |= {"white_box": white_box, "of_own_checkpoint": own}
        curves.append({**curve, "points": [zero, *points]})
    real = [attack for attack in attacks if attack != NOISE]
    if real:
        rights = [np.all([found[attack][place][0] for attack in real], axis=0) for place in range(len(epsilons))]
        points = [_point(eps, right_N, clean_N, None) for eps, right_N in zip(epsilons, rights, strict=True)]
        curves.append({"attack": WORST, "of": real, "points": [zero, *points]})
    return {**description, "curves": curves}


def _point(
    epsilon: float, right_N: NDArray[np.bool_], clean_N: NDArray[np.bool_], queries_N: NDArray[np.int64] | None
) -> dict[str, Any]:
    """Return one point of a curve.

    `right_bits` holds one bit per image; the first image is the highest bit of the first byte.
    """
    point: dict[str, Any] = {"epsilon": epsilon / 255, "right": int(right_N.sum())}
    if epsilon:
        point["radius"] = radius_of(epsilon)
    point["right_bits"] = np.packbits(right_N).tobytes().hex()
    if queries_N is not None:
        fooled_N = queries_N[clean_N & ~right_N]
        point |= {
            "queries_total": int(queries_N.sum()),
            "queries_mean_of_fooled": float(fooled_N.mean()) if len(fooled_N) else None,
            "queries_median_of_fooled": float(np.median(fooled_N)) if len(fooled_N) else None,
        }
    return point
