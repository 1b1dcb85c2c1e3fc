"""`Bench`: measure targets × batch sizes × numbers of callers in interleaved rounds."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runtime.bench.machine import cpu_state, gpu_state, usage
from runtime.bench.pictures import encoded_images, pixels
from runtime.bench.rounds import measure_probe, round_order, run_closed_loop
from runtime.bench.statistics import ratio, summary
from runtime.bench.targets import HOST, BenchTarget, Work
from runtime.errors import ConfigError

__all__ = ["Bench", "BenchConfig", "Point", "Progress", "choose_batch_sizes"]

_BATCH_SIZES = (1, 8, 32)
"""Default batch sizes."""
_TARGETS_CLOCK = ("compute", "h2d", "d2h", "latency")
"""Quantities that are measured with the target's own clock; the others use the host's."""
_WARM_UP_CALLS = 2
"""Minimum number of warm-up calls per caller, after the first one, which is never counted."""

Progress = Callable[[int, int, str], None]
"""Called with the numbers of finished and of all rounds, and a description of the current ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """Settings of a run. Warm-up, duration and iterations are those of trtexec."""

    batch_sizes: tuple[int, ...] = ()
    """Batch sizes (default: those of 1, 8 and 32 that all targets support, or the fixed batch size
    that they share)."""
    concurrency: tuple[int, ...] = (1,)
    """Numbers of threads that call a target concurrently, each again when its call has returned."""
    warm_up_ms: float = 200.0
    """Warm-up of each target before a point is measured; at least three calls."""
    duration_s: float = 3.0
    """Seconds per quantity, target and point, over all rounds."""
    iterations: int = 10
    """Minimum number of calls per quantity, target and point; at least one per round."""
    rounds: int = 10
    """Interleaved rounds. Ratios compare times of the same round, which makes them robust to
    changes of the machine's speed."""
    seed: int = 0
    """Seed of the order in each round, the images and the intervals."""

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "concurrency"):
            sizes = getattr(self, name)
            if any(size < 1 for size in sizes):
                raise ConfigError(f"{name} must be at least 1; found {', '.join(map(str, sizes))}")
            if len(set(sizes)) < len(sizes):
                raise ConfigError(f"{name} contains a number twice: {', '.join(map(str, sizes))}")
        if not self.concurrency:
            raise ConfigError("concurrency must contain a number, such as 1 for a single caller")
        if self.iterations < 1 or self.rounds < 1 or self.seed < 0:
            raise ConfigError(
                f"iterations and rounds must be at least 1 and the seed at least 0; found {self.iterations}, "
                f"{self.rounds} and {self.seed}"
            )
        for name in ("warm_up_ms", "duration_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be at least 0; found {getattr(self, name)}")

    @property
    def round_s(self) -> float:
        """Seconds per quantity in one round."""
        return self.duration_s / self.rounds

    @property
    def round_calls(self) -> int:
        """Minimum number of calls per quantity in one round."""
        return -(-self.iterations // self.rounds)


def choose_batch_sizes(targets: Sequence[BenchTarget], requested: Sequence[int]) -> tuple[int, ...]:
    """Return the batch sizes of a run.

    A session pads and splits batches of other sizes. Their time is not that of the requested size,
    so such sizes are rejected before anything is measured.

    Args:
        targets: all must support every size.
        requested: batch sizes. If empty: those of 1, 8 and 32 that all targets support, or the
            fixed batch size that they share.

    Raises:
        ConfigError: a target does not support a requested size, or no size is supported by all.
    """
    shared = _shared_sizes(targets)
    if not requested:
        if not shared:
            supported = "; ".join(f"{target.name} runs {_describe_supported(target)}" for target in targets)
            raise ConfigError(f"no batch size is supported by all files: {supported}. Measure them separately")
        return shared
    problems = [
        f"{target.name} runs {_describe_supported(target)}"
        for target in targets
        if not all(_supports(target, size) for size in requested)
    ]
    if problems:
        advice = f"use --batch-sizes {','.join(map(str, shared))}" if shared else "measure the files separately"
        raise ConfigError(
            f"--batch-sizes {','.join(map(str, requested))}: {'; '.join(problems)}. The time of padded or split "
            f"batches would be misleading; {advice}, or export or build the file for these sizes"
        )
    return tuple(requested)


def _shared_sizes(targets: Sequence[BenchTarget]) -> tuple[int, ...]:
    fixed = dict.fromkeys(target.fixed_batch for target in targets if target.fixed_batch is not None)
    candidates = tuple(fixed) or _BATCH_SIZES
    return tuple(size for size in candidates if all(_supports(target, size) for target in targets))


def _supports(target: BenchTarget, size: int) -> bool:
    if target.fixed_batch is not None:
        return size == target.fixed_batch
    return target.most_images is None or size <= target.most_images


def _describe_supported(target: BenchTarget) -> str:
    if target.fixed_batch is not None:
        return f"batches of {target.fixed_batch}"
    if target.most_images is None or target.most_images > 1 << 30:
        return "batches of any size"
    return f"batches of up to {target.most_images}"


@dataclass(slots=True)
class _Tally:
    """Measurements of one target at one point."""

    times_ms: dict[str, list[list[float]]] = field(default_factory=dict)
    """Quantity → times of each round."""
    calls: int = 0
    wall_s: float = 0.0
    calls_s: list[float] = field(default_factory=list)
    """Calls per second in each round."""

    def add(self, found: dict[str, list[float]]) -> None:
        """Add the times of one round."""
        for quantity, times in found.items():
            self.times_ms.setdefault(quantity, []).append(times)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Measurements of one target with one batch size and number of callers."""

    model: str
    batch_size: int
    concurrency: int
    content: dict[str, Any]
    """The measurements as plain values, as results contain them."""


class Bench:
    """A run. If it is interrupted, `points` contains the finished points."""

    def __init__(self, targets: Sequence[BenchTarget], config: BenchConfig, images: Path | None = None) -> None:
        """Choose the batch sizes and prepare the images.

        Args:
            targets: targets to measure. The others are compared with the first one.
            config: settings of the run.
            images: folder of image files for `predict` (default: generated images).

        Raises:
            InputError: a target does not support a batch size, or the folder has no images.
        """
        self.targets = tuple(targets)
        self.config = config
        self.batch_sizes = choose_batch_sizes(targets, config.batch_sizes)
        self.points: list[Point] = []
        self.began = datetime.now(UTC).isoformat(timespec="seconds")
        self.before, self.usage_before = cpu_state(), usage()
        self._on_gpu = any(target.facts.get("device") == "cuda" for target in targets)
        self.gpu_states = [gpu_state()] if self._on_gpu else []
        self._encoded = encoded_images(max(self.batch_sizes), images, config.seed)

    def measure(self, progress: Progress | None = None) -> None:
        """Measure all points; each is added to `points` when it is finished.

        Raises:
            RunFailed: a target failed. Points that are finished are kept, as with Ctrl-C.
        """
        rounds = self.config.rounds
        total = len(self.batch_sizes) * len(self.config.concurrency) * rounds
        done = 0
        for size in self.batch_sizes:
            works = [
                target.prepare(pixels(size, target.image_size, self.config.seed), self._encoded[:size])
                for target in self.targets
            ]
            for callers in self.config.concurrency:
                description = f"batch {size}, {callers} caller{'s' * (callers > 1)}"

                def show(number: int, description: str = description, before: int = done) -> None:
                    if progress is not None:
                        progress(before + number, total, description)

                self.points += self._measure_point(works, size, callers, show)
                done += rounds
                if self._on_gpu:
                    self.gpu_states.append(gpu_state())

    def _measure_point(
        self, works: Sequence[Work], size: int, callers: int, show: Callable[[int], None]
    ) -> list[Point]:
        config = self.config
        show(0)
        for work in works:
            # The warm-up has as many callers: each context of an engine captures a graph in its
            # second run.
            run_closed_loop(work.run, callers, config.warm_up_ms / 1000, _WARM_UP_CALLS)
        tallies = [_Tally() for _ in works]
        probes = dict.fromkeys(name for work in works for name in work.probes) if callers == 1 else {}
        for number in range(config.rounds):
            for place in round_order(len(works), number, config.seed):
                load = run_closed_loop(works[place].run, callers, config.round_s, config.round_calls)
                tally = tallies[place]
                tally.add({"end_to_end": load.times_ms})
                tally.calls += len(load.times_ms)
                tally.wall_s += load.wall_s
                tally.calls_s.append(load.calls_s)
            for name in probes:  # compared quantities are measured close together
                for place in round_order(len(works), number, config.seed):
                    if name in works[place].probes:
                        probe = works[place].probes[name]
                        tallies[place].add(measure_probe(probe, config.round_s, config.round_calls))
            show(number + 1)
        return [
            Point(
                model=target.name,
                batch_size=size,
                concurrency=callers,
                content=_point_content(target, tally, None if place == 0 else tallies[0], size, callers, config.seed),
            )
            for place, (target, tally) in enumerate(zip(self.targets, tallies, strict=True))
        ]


def _point_content(
    target: BenchTarget, tally: _Tally, first: _Tally | None, size: int, callers: int, seed: int
) -> dict[str, Any]:
    quantities = {}
    for quantity, rounds in tally.times_ms.items():
        medians = [statistics.median(times) for times in rounds]
        found = summary([ms for times in rounds for ms in times])
        found["clock"] = target.facts["clock"] if quantity in _TARGETS_CLOCK else HOST
        found["round_medians_ms"] = medians
        if first is not None and quantity in first.times_ms and min(medians) > 0:
            others = [statistics.median(times) for times in first.times_ms[quantity]]
            if min(others) > 0:
                found["ratio"] = dataclasses.asdict(ratio(medians, others, seed))
        quantities[quantity] = found
    images_s = [size * calls_s for calls_s in tally.calls_s]
    content: dict[str, Any] = {
        "model": target.name,
        "batch_size": size,
        "concurrency": callers,
        "images_s": size * tally.calls / tally.wall_s,
        "round_images_s": images_s,
        "quantities": quantities,
    }
    if first is not None:
        content["images_s_ratio"] = dataclasses.asdict(ratio(tally.calls_s, first.calls_s, seed))
    return content
