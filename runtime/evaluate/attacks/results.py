"""From outcomes to a result a model: `advprop.attack/1`, see `runtime.evaluate.report.measured`, and more."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.evaluate.attacks.ball import radius_of
from runtime.evaluate.attacks.config import NOISE, SQUARE, AttackConfig
from runtime.evaluate.attacks.outcomes import CLEAN, Key, Outcomes
from runtime.evaluate.attacks.transfer import Attacker
from runtime.evaluate.images import LabeledImages
from runtime.evaluate.models import Model
from runtime.evaluate.provenance import described, versions_of
from runtime.evaluate.report.measured import ATTACK_FORMAT

__all__ = ["WORST", "AttackResult", "result_of", "skeleton"]

WORST = "worst"
"""The curve of images that no attack fools; the noise is none."""

AttackResult = dict[str, Any]


def skeleton(
    model: Model, attacker: Attacker | None, images: LabeledImages, config: AttackConfig, data: Mapping[str, Any]
) -> AttackResult:
    """Returns a result without curves: all that they follow from, as plain values."""
    return {
        "format": ATTACK_FORMAT,
        "model": described(model),
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
        "versions": versions_of(model),
    }


def result_of(
    bare: AttackResult, name: str, attacks: Sequence[str], blocks: Sequence[int], done: Mapping[Key, Outcomes]
) -> AttackResult:
    """Puts a model's outcomes together.

    Args:
        bare: what `skeleton` returned.
        name: the model's, in the outcomes.
        attacks: those made on it.
        blocks: numbers of the blocks.
        done: every outcome.
    """
    settings, checkpoint = bare["settings"], bare["checkpoint"]
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
            _point(eps, right_N, clean_N, used_N) for eps, (right_N, used_N) in zip(epsilons, values, strict=True)
        ]
        most = {SQUARE: settings["queries"], NOISE: settings["draws"]}.get(attack)
        curve: dict[str, Any] = {"attack": attack, "queries": most or max(int(used_N.max()) for _, used_N in values)}
        if most is None:
            same = checkpoint["sha256"] == bare["model"].get("sha256")
            own = same or checkpoint["sha256"] == bare["model"].get("checkpoint_sha256")
            curve |= {"white_box": same, "of_own_checkpoint": own}
        curves.append({**curve, "points": [zero, *points]})
    real = [attack for attack in attacks if attack != NOISE]
    if real:
        rights = [np.all([found[attack][place][0] for attack in real], axis=0) for place in range(len(epsilons))]
        points = [_point(eps, right_N, clean_N, None) for eps, right_N in zip(epsilons, rights, strict=True)]
        curves.append({"attack": WORST, "of": real, "points": [zero, *points]})
    return {**bare, "curves": curves}


def _point(
    epsilon: float, right_N: NDArray[np.bool_], clean_N: NDArray[np.bool_], used_N: NDArray[np.int64] | None
) -> dict[str, Any]:
    """One number, with every image's own answer: bit by bit, the first image the highest bit of the first byte."""
    point: dict[str, Any] = {"epsilon": epsilon / 255, "right": int(right_N.sum())}
    if epsilon:
        point["radius"] = radius_of(epsilon)
    point["right_bits"] = np.packbits(right_N).tobytes().hex()
    if used_N is not None:
        fooled_N = used_N[clean_N & ~right_N]
        point |= {
            "queries_total": int(used_N.sum()),
            "queries_mean_of_fooled": float(fooled_N.mean()) if len(fooled_N) else None,
            "queries_median_of_fooled": float(np.median(fooled_N)) if len(fooled_N) else None,
        }
    return point
