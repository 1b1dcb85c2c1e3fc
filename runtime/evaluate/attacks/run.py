"""`attack`: models × attacks × ε, in blocks of images that a kill does not undo.

Shape suffixes: N images, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ConfigError, Interrupted
from runtime.evaluate.attacks.ball import radius_of
from runtime.evaluate.attacks.config import GRADIENT, NOISE, SQUARE, AttackConfig
from runtime.evaluate.attacks.draws import generator, seed_of
from runtime.evaluate.attacks.noise import noise
from runtime.evaluate.attacks.outcomes import CLEAN, Key, OutcomeJournal, Outcomes
from runtime.evaluate.attacks.results import AttackResult, result_of, skeleton
from runtime.evaluate.attacks.square import square
from runtime.evaluate.attacks.target import Victim, judge
from runtime.evaluate.attacks.transfer import Attacker, transfer
from runtime.evaluate.cells import SuiteConfig
from runtime.evaluate.image_workers import load_block
from runtime.evaluate.models import Model
from runtime.evaluate.provenance import alike
from runtime.evaluate.suites import open_suite

__all__ = ["Target", "attack"]

Tick = Callable[[float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A model, and which of the attacks are made on it."""

    model: Model
    attacks: tuple[str, ...]


def attack(
    targets: Sequence[Target],
    data: SuiteConfig,
    config: AttackConfig,
    *,
    out: Path,
    attacker: Attacker | None = None,
    batch_size: int = 16,
    progress: Callable[[float, int], None] | None = None,
) -> list[AttackResult]:
    """Attacks models, going on where an earlier run of the same was stopped.

    Args:
        targets: models of the same classes and input size, each of another name.
        data: the images, and how many of them.
        config: which attacks, how strong.
        out: folder of the journal, which is there until all is done.
        attacker: the checkpoint whose gradient PGD and APGD follow; None where neither is asked for.
        batch_size: images attacked together.
        progress: told how many of all pieces of work are done.

    Returns:
        A result a target, in their order.

    Raises:
        InputError: the images or the models are not as they should be.
        OutputError: the journal cannot be written.
        VerificationError: an attack left the ε-ball.
        Interrupted: Ctrl-C; the same call goes on.
    """
    _check(targets, config, attacker, batch_size)
    return _Run(targets, data, config, attacker, batch_size).carry_out(out, progress or (lambda done, total: None))


def _check(targets: Sequence[Target], config: AttackConfig, attacker: Attacker | None, batch_size: int) -> None:
    first = targets[0].model
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1; found {batch_size}")
    for name, spec in [
        *((target.model.name, target.model.spec) for target in targets),
        *([(f"the checkpoint {attacker.name}", attacker.spec)] if attacker else []),
    ]:
        if not alike(first.spec, spec):
            shown = [
                f"{own.preprocessing.width}×{own.preprocessing.height} pixels and {len(own.classes)} classes"
                for own in (first.spec, spec)
            ]
            raise ConfigError(
                f"{name} has other classes, another input size or crop than {first.name}, so the same images cannot "
                f"be shown to both: found {shown[1]}, expected {shown[0]}. Attack it in a run of its own"
            )
    config.check_gradient(attacker is not None)


class _Run:
    """Everything that one call needs to know."""

    def __init__(
        self,
        targets: Sequence[Target],
        data: SuiteConfig,
        config: AttackConfig,
        attacker: Attacker | None,
        batch_size: int,
    ) -> None:
        self._targets, self._config, self._attacker, self._size = targets, config, attacker, batch_size
        self._spec = targets[0].model.spec
        suite = open_suite(data, self._spec)
        self._images = suite.cells[0].images
        self._blocks = range(-(-len(self._images) // batch_size))
        said = {"path": str(data.data), "limit": data.limit, "skipped": list(suite.skipped), "batch_size": batch_size}
        self._bare = [skeleton(target.model, attacker, self._images, config, said) for target in targets]
        made = [name for name in config.attacks if any(name in target.attacks for target in targets)]
        self._keys: list[Key] = [
            (name, epsilon, block)
            for block in self._blocks
            for name, epsilon in [(CLEAN, 0.0), *((name, eps) for name in made for eps in config.epsilons)]
        ]

    def carry_out(self, out: Path, progress: Callable[[float, int], None]) -> list[AttackResult]:
        """Does what is not done yet, and returns the results."""
        plan = {"attacked": self._bare, "with": [list(target.attacks) for target in self._targets]}
        with OutcomeJournal(out, plan) as journal:
            try:
                for block in self._blocks:
                    self._block(block, journal, progress)
            except KeyboardInterrupt:
                raise Interrupted(
                    f"stopped: {len(journal.done)} of {len(self._keys)} pieces of work are done; the same command goes "
                    "on from there"
                ) from None
            results = [
                result_of(bare, target.model.name, target.attacks, self._blocks, journal.done)
                for bare, target in zip(self._bare, self._targets, strict=True)
            ]
            journal.finish()
        return results

    def _block(self, block: int, journal: OutcomeJournal, progress: Callable[[float, int], None]) -> None:
        todo = [key for key in self._keys if key[2] == block and key not in journal.done]
        progress(len(journal.done), len(self._keys))
        if not todo:
            return
        within = slice(block * self._size, (block + 1) * self._size)
        names = self._images.names[within]
        clean_NHWC = load_block(self._images.source, names, self._spec.preprocessing, "fit")
        labels_N = np.asarray(self._images.labels[within], np.int64)
        for key in todo:
            done = len(journal.done)

            def tick(share: float, done: int = done) -> None:
                progress(done + share, len(self._keys))

            name, epsilon, _ = key
            if name == CLEAN:
                outcomes = self._clean(clean_NHWC, labels_N)
            else:
                clean = journal.done[CLEAN, 0.0, block]
                seeds = [seed_of(self._config.seed, image, name, epsilon) for image in names]
                outcomes = self._attack(name, radius_of(epsilon), clean_NHWC, labels_N, clean, seeds, tick)
            journal.add(key, outcomes)
            progress(len(journal.done), len(self._keys))

    def _clean(self, clean_NHWC: NDArray[np.uint8], labels_N: NDArray[np.int64]) -> Outcomes:
        zero_N = np.zeros(len(labels_N), np.int64)
        models = [target.model for target in self._targets]
        return {model.name: (judge(model, clean_NHWC, labels_N)[0], zero_N) for model in models}

    def _attack(
        self,
        name: str,
        radius: int,
        clean_NHWC: NDArray[np.uint8],
        labels_N: NDArray[np.int64],
        clean: Outcomes,
        seeds: Sequence[int],
        tick: Tick,
    ) -> Outcomes:
        """Makes one attack on a block of images, on all models that it is for."""
        config, models = self._config, [target.model for target in self._targets if name in target.attacks]
        attacked_ANHWC = None
        if name in GRADIENT:  # made once, shown to all
            assert self._attacker is not None
            attacked_ANHWC = self._attacker.craft(
                name, clean_NHWC, labels_N, radius=radius, seeds=seeds, steps=config.steps, restarts=config.restarts
            )
        outcomes: Outcomes = {}
        for place, model in enumerate(models):
            victim = Victim(model, clean_NHWC, labels_N, clean[model.name][0], radius, name)
            draws_N = [generator(seed) for seed in seeds]  # afresh: models have the same luck

            def part(share: float, place: int = place) -> None:
                tick((place + share) / len(models))

            if attacked_ANHWC is not None:
                transfer(victim, attacked_ANHWC, part)
            elif name == SQUARE:
                share = config.initial_share
                square(victim, draws_N, queries=config.queries, initial_share=share, tick=part)
            else:
                assert name == NOISE
                noise(victim, draws_N, draws=config.draws, tick=part)
            outcomes[model.name] = (victim.standing_N, victim.queries_N)
        return outcomes
