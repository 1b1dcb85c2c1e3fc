"""`Bench`: contestants × batch sizes × callers, in interleaved rounds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runtime.bench.config import BenchConfig
from runtime.bench.cpu import cpu_state, usage
from runtime.bench.gpu import gpu_state
from runtime.bench.pictures import encoded_images, pixels
from runtime.bench.rounds import crowd, order, turn
from runtime.bench.sizes import choose_sizes
from runtime.bench.statistics import ratio, summary
from runtime.bench.targets import HOST, Contestant, Work

__all__ = ["Bench", "Point"]

_BY_CLOCK = ("compute", "h2d", "d2h", "latency")
"""Quantities that the contestant's own clock measures; the others are the host's."""
_WARM_CALLS = 2
"""Of each caller, beside the one that is never counted."""

Progress = Callable[[int, int, str], None]
"""Called with the rounds that are done, all rounds, and what is measured now."""


@dataclass(slots=True)
class _Tally:
    """What was measured of one contestant at one point, round by round."""

    times_ms: dict[str, list[list[float]]] = field(default_factory=dict)
    calls: int = 0
    wall_s: float = 0.0
    calls_s: list[float] = field(default_factory=list)

    def add(self, found: dict[str, list[float]]) -> None:
        for quantity, times in found.items():
            self.times_ms.setdefault(quantity, []).append(times)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One contestant with one batch size and number of callers; plain values in `content`, which results hold."""

    model: str
    batch_size: int
    concurrency: int
    content: dict[str, Any]


class Bench:
    """A run that can be stopped: `points` has what is finished."""

    def __init__(self, contestants: Sequence[Contestant], config: BenchConfig, images: Path | None = None) -> None:
        """Checks that every contestant takes what it will be given, and makes the images.

        Args:
            contestants: the first is the one that the others are compared with.
            config: what is measured.
            images: a folder of image files for `predict`; None makes some.

        Raises:
            InputError: a contestant does not take one of the batch sizes, or the folder has no images.
        """
        self.contestants = tuple(contestants)
        self.config = config
        self.batch_sizes = choose_sizes(contestants, config.batch_sizes)
        self.points: list[Point] = []
        self.began = datetime.now(UTC).isoformat(timespec="seconds")
        self.before, self.usage_before = cpu_state(), usage()
        self._on_gpu = any(contestant.facts.get("device") == "cuda" for contestant in contestants)
        self.gpu_states = [gpu_state()] if self._on_gpu else []
        self._encoded = encoded_images(max(self.batch_sizes), images, config.seed)

    def measure(self, progress: Progress | None = None) -> None:
        """Measures every point, and keeps each as soon as it is whole.

        Raises:
            RunFailed: a contestant failed; the points before it are kept, as they are at Ctrl-C.
        """
        rounds = self.config.rounds
        total = len(self.batch_sizes) * len(self.config.concurrency) * rounds
        done = 0
        for size in self.batch_sizes:
            works = [
                one.prepare(pixels(size, one.image_size, self.config.seed), self._encoded[:size])
                for one in self.contestants
            ]
            for callers in self.config.concurrency:
                words = f"batch {size}, {callers} caller{'s' * (callers > 1)}"

                def show(number: int, words: str = words, before: int = done) -> None:
                    if progress is not None:
                        progress(before + number, total, words)

                self.points += self._point(works, size, callers, show)
                done += rounds
                if self._on_gpu:
                    self.gpu_states.append(gpu_state())

    def _point(self, works: Sequence[Work], size: int, callers: int, show: Callable[[int], None]) -> list[Point]:
        config = self.config
        show(0)
        for work in works:
            # By as many callers as will come: each context of an engine captures its own graph, at its second run.
            crowd(work.run, callers, config.warm_up_ms / 1000, _WARM_CALLS)
        tallies = [_Tally() for _ in works]
        kinds = dict.fromkeys(kind for work in works for kind in work.probes) if callers == 1 else {}
        for number in range(config.rounds):
            for place in order(len(works), number, config.seed):
                seen = crowd(works[place].run, callers, config.turn_s, config.turn_calls)
                tally = tallies[place]
                tally.add({"end_to_end": seen.times_ms})
                tally.calls += len(seen.times_ms)
                tally.wall_s += seen.wall_s
                tally.calls_s.append(seen.calls_s)
            for kind in kinds:  # one kind after the other: what is compared is measured close together
                for place in order(len(works), number, config.seed):
                    if kind in works[place].probes:
                        tallies[place].add(turn(works[place].probes[kind], config.turn_s, config.turn_calls))
            show(number + 1)
        return [
            Point(
                model=one.name,
                batch_size=size,
                concurrency=callers,
                content=_content(one, tally, None if place == 0 else tallies[0], size, callers, config.seed),
            )
            for place, (one, tally) in enumerate(zip(self.contestants, tallies, strict=True))
        ]


def _content(
    contestant: Contestant, tally: _Tally, first: _Tally | None, size: int, callers: int, seed: int
) -> dict[str, Any]:
    quantities = {}
    for quantity, rounds in tally.times_ms.items():
        medians = [statistics.median(times) for times in rounds]
        found = summary([ms for times in rounds for ms in times])
        found["clock"] = contestant.facts["clock"] if quantity in _BY_CLOCK else HOST
        found["round_medians_ms"] = medians
        if first is not None and quantity in first.times_ms and min(medians) > 0:
            others = [statistics.median(times) for times in first.times_ms[quantity]]
            if min(others) > 0:
                found["ratio"] = dataclasses.asdict(ratio(medians, others, seed))
        quantities[quantity] = found
    images_s = [size * calls_s for calls_s in tally.calls_s]
    content: dict[str, Any] = {
        "model": contestant.name,
        "batch_size": size,
        "concurrency": callers,
        "images_s": size * tally.calls / tally.wall_s,
        "round_images_s": images_s,
        "quantities": quantities,
    }
    if first is not None:
        content["images_s_ratio"] = dataclasses.asdict(ratio(tally.calls_s, first.calls_s, seed))
    return content
