"""Run attacks on models, block by block, and resume an interrupted run.

Shape suffixes: N images, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ConfigError, DataError, Interrupted
from runtime.evaluate.attacks.config import CLEAN, GRADIENT, NOISE, SQUARE, AttackConfig
from runtime.evaluate.attacks.methods import (
    Attacker,
    image_generator,
    image_seed,
    noise,
    square,
    transfer,
)
from runtime.evaluate.attacks.results import AttackResult, Key, Outcomes, describe_attack, result_of
from runtime.evaluate.attacks.target import AttackTarget, evaluate_images, radius_of
from runtime.evaluate.cells import SuiteConfig
from runtime.evaluate.image_workers import load_block
from runtime.evaluate.models import Model, same_inputs
from runtime.evaluate.progress_log import ProgressLog
from runtime.evaluate.suites import open_suite

__all__ = ["AttackedModel", "attack"]

Progress = Callable[[float, int], None]
"""Called with the number of finished steps, which may be fractional, and the number of all
steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackedModel:
    """A model, and the attacks to run on it."""

    model: Model
    attacks: tuple[str, ...]


def attack(
    models: Sequence[AttackedModel],
    data: SuiteConfig,
    config: AttackConfig,
    *,
    out: Path,
    attacker: Attacker | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[AttackResult]:
    """Attack models. An interrupted run with the same arguments is resumed.

    Args:
        models: models with the same classes and input size, and different names.
        data: test set, limit and seed of the images.
        config: attacks and their strength.
        out: folder of the progress log, which is deleted when the run is finished.
        attacker: checkpoint whose gradient PGD and APGD follow; None if neither of them runs.
        batch_size: images attacked together.
        progress: called as the run proceeds.

    Returns:
        One result per model, in the same order.

    Raises:
        InputError: the images or the models are invalid.
        OutputError: the progress log cannot be written.
        VerificationError: an attack left the ε-ball.
        Interrupted: Ctrl-C was pressed; the same call resumes.
    """
    _check(models, config, attacker, batch_size)
    return _Run(models, data, config, attacker, batch_size).run(out, progress or (lambda done, total: None))


def _check(models: Sequence[AttackedModel], config: AttackConfig, attacker: Attacker | None, batch_size: int) -> None:
    first = models[0].model
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1; found {batch_size}")
    for name, spec in [
        *((attacked.model.name, attacked.model.spec) for attacked in models),
        *([(f"the checkpoint {attacker.name}", attacker.spec)] if attacker else []),
    ]:
        if not same_inputs(first.spec, spec):
            expected, found = [
                f"{own.preprocessing.width}×{own.preprocessing.height} pixels and {len(own.classes)} classes"
                for own in (first.spec, spec)
            ]
            raise ConfigError(
                f"{name} has other classes, another input size or another crop than {first.name}, so they cannot "
                f"share images: found {found}, expected {expected}. Attack it in a separate run"
            )
    config.check_gradient(attacker is not None)


@dataclass(frozen=True, slots=True)
class _Block:
    """Images that are attacked together."""

    names: Sequence[str]
    clean_NHWC: NDArray[np.uint8]
    labels_N: NDArray[np.int64]


class _Run:
    """The settings and state of one call of `attack`."""

    def __init__(
        self,
        models: Sequence[AttackedModel],
        data: SuiteConfig,
        config: AttackConfig,
        attacker: Attacker | None,
        batch_size: int,
    ) -> None:
        self._models, self._config, self._attacker, self._batch_size = models, config, attacker, batch_size
        self._spec = models[0].model.spec
        suite = open_suite(data, self._spec)
        self._images = suite.cells[0].images
        self._blocks = range(-(-len(self._images) // batch_size))
        facts = {"path": str(data.data), "limit": data.limit, "skipped": list(suite.skipped), "batch_size": batch_size}
        self._descriptions = [
            describe_attack(attacked.model, attacker, self._images, config, facts) for attacked in models
        ]
        names = [name for name in config.attacks if any(name in attacked.attacks for attacked in models)]
        self._keys: list[Key] = [
            (name, epsilon, block)
            for block in self._blocks
            for name, epsilon in [(CLEAN, 0.0), *((name, eps) for name in names for eps in config.epsilons)]
        ]
        self._done: dict[Key, Outcomes] = {}

    def run(self, out: Path, progress: Progress) -> list[AttackResult]:
        """Run the remaining steps and return the results."""
        plan = {"attacked": self._descriptions, "with": [list(attacked.attacks) for attacked in self._models]}
        with ProgressLog(out, plan, self._restore) as log:
            try:
                for block in self._blocks:
                    self._run_block(block, log, progress)
            except KeyboardInterrupt:
                raise Interrupted(
                    f"stopped: {len(self._done)} of {len(self._keys)} steps are finished; run the same command to "
                    "resume"
                ) from None
            results = [
                result_of(description, attacked.model.name, attacked.attacks, self._blocks, self._done)
                for description, attacked in zip(self._descriptions, self._models, strict=True)
            ]
            log.remove()
        return results

    def _restore(self, entry: Any) -> None:
        """Read an entry of the progress log, which `_entry` wrote."""
        key = (str(entry["attack"]), float(entry["epsilon"]), int(entry["block"]))
        if key not in self._keys:
            raise DataError(f"{key[0]} with ε = {key[1]:g} on block {key[2]} is not part of this run")
        if key in self._done:
            raise DataError(f"{key[0]} with ε = {key[1]:g} on block {key[2]} is already finished")
        self._done[key] = {
            str(name): (np.asarray(found["right"], np.int64).astype(bool), np.asarray(found["queries"], np.int64))
            for name, found in dict(entry["models"]).items()
        }

    @staticmethod
    def _entry(key: Key, outcomes: Outcomes) -> dict[str, Any]:
        models = {
            name: {"right": right_N.astype(int).tolist(), "queries": queries_N.tolist()}
            for name, (right_N, queries_N) in outcomes.items()
        }
        return {"attack": key[0], "epsilon": key[1], "block": key[2], "models": models}

    def _run_block(self, number: int, log: ProgressLog, progress: Progress) -> None:
        todo = [key for key in self._keys if key[2] == number and key not in self._done]
        progress(len(self._done), len(self._keys))
        if not todo:
            return
        within = slice(number * self._batch_size, (number + 1) * self._batch_size)
        names = self._images.names[within]
        block = _Block(
            names,
            load_block(self._images.source, names, self._spec.preprocessing, "fit"),
            np.asarray(self._images.labels[within], np.int64),
        )
        for key in todo:
            done = len(self._done)

            def share_done(share: float, done: int = done) -> None:
                progress(done + share, len(self._keys))

            outcomes = self._clean(block) if key[0] == CLEAN else self._attack(key, block, share_done)
            log.append(self._entry(key, outcomes))
            progress(len(self._done), len(self._keys))

    def _clean(self, block: _Block) -> Outcomes:
        zero_N = np.zeros(len(block.labels_N), np.int64)
        models = [attacked.model for attacked in self._models]
        return {model.name: (evaluate_images(model, block.clean_NHWC, block.labels_N)[0], zero_N) for model in models}

    def _attack(self, key: Key, block: _Block, progress: Callable[[float], None]) -> Outcomes:
        """Run one attack on a block of images, for all models that it is configured for."""
        name, epsilon, number = key
        config, radius = self._config, radius_of(epsilon)
        models = [attacked.model for attacked in self._models if name in attacked.attacks]
        clean = self._done[CLEAN, 0.0, number]
        seeds = [image_seed(config.seed, image, name, epsilon) for image in block.names]
        attacked_ANHWC = None
        if name in GRADIENT:  # the same images for all models
            assert self._attacker is not None
            attacked_ANHWC = self._attacker.craft(
                name,
                block.clean_NHWC,
                block.labels_N,
                radius=radius,
                seeds=seeds,
                steps=config.steps,
                restarts=config.restarts,
            )
        outcomes: Outcomes = {}
        for place, model in enumerate(models):
            target = AttackTarget(model, block.clean_NHWC, block.labels_N, clean[model.name][0], radius, name)
            generators_N = [image_generator(seed) for seed in seeds]  # all models get the same random numbers

            def share_done(share: float, place: int = place) -> None:
                progress((place + share) / len(models))

            if attacked_ANHWC is not None:
                transfer(target, attacked_ANHWC, share_done)
            elif name == SQUARE:
                initial_share = config.initial_share
                square(target, generators_N, queries=config.queries, initial_share=initial_share, progress=share_done)
            else:
                assert name == NOISE
                noise(target, generators_N, draws=config.draws, progress=share_done)
            outcomes[model.name] = (target.not_fooled_N, target.queries_N)
        return outcomes
