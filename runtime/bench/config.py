"""`BenchConfig`: what is measured, how often, and in which order."""

from __future__ import annotations

import math
from dataclasses import dataclass

from runtime.errors import ConfigError

__all__ = ["BenchConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """A run. Warm-up, duration and iterations are trtexec's, and have its defaults."""

    batch_sizes: tuple[int, ...] = ()
    """Images a call. None: those of 1, 8 and 32 that all contestants take, or the fixed batch that they share."""
    concurrency: tuple[int, ...] = (1,)
    """Threads that call one session at the same time, each as soon as it has its answer."""
    warm_up_ms: float = 200.0
    """How long each contestant is run before anything of a point is measured; three calls at least."""
    duration_s: float = 3.0
    """How long each quantity of a contestant is measured at a point, its rounds together."""
    iterations: int = 10
    """Calls at the least, likewise; each round has one at the least."""
    rounds: int = 10
    """Turns that each contestant gets. Ratios are of one round, so that they hold when the machine's speed changes."""
    seed: int = 0
    """Of the order in each round, the images and the intervals."""

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "concurrency"):
            sizes = getattr(self, name)
            if any(size < 1 for size in sizes):
                raise ConfigError(f"{name} must be numbers of at least 1; found {', '.join(map(str, sizes))}")
            if len(set(sizes)) < len(sizes):
                raise ConfigError(f"{name} has a number twice: {', '.join(map(str, sizes))}; give each once")
        if not self.concurrency:
            raise ConfigError("concurrency has no number; 1 is one caller at a time")
        if self.iterations < 1 or self.rounds < 1 or self.seed < 0:
            raise ConfigError(
                f"iterations and rounds must be at least 1 and the seed at least 0; found {self.iterations}, "
                f"{self.rounds} and {self.seed}"
            )
        for name in ("warm_up_ms", "duration_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be at least 0; found {getattr(self, name)}")

    @property
    def turn_s(self) -> float:
        """Seconds of one quantity in one round."""
        return self.duration_s / self.rounds

    @property
    def turn_calls(self) -> int:
        """Calls of one quantity in one round, at the least."""
        return -(-self.iterations // self.rounds)
