"""Which batch sizes are measured."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.bench.targets import Contestant
from runtime.errors import ConfigError

__all__ = ["choose_sizes"]

_USUAL = (1, 8, 32)


def choose_sizes(contestants: Sequence[Contestant], asked: Sequence[int]) -> tuple[int, ...]:
    """Returns the batch sizes of a run.

    A session would pad and split other batches to fit, whose time is not that of the size that is asked for: they are
    refused, before anything is measured.

    Args:
        contestants: all must take every size.
        asked: the sizes; none: those of 1, 8 and 32 that all take, or the fixed batch that they share.

    Raises:
        ConfigError: a contestant does not take one as it is, or there is none that all take.
    """
    if asked:
        problems = [f"{one.name} takes {_takes(one)}" for one in contestants if not all(_fits(one, n) for n in asked)]
        if problems:
            shared = _shared(contestants)
            advice = f"use --batch {','.join(map(str, shared))}" if shared else "bench them one by one"
            raise ConfigError(
                f"--batch {','.join(map(str, asked))}: {'; '.join(problems)}. To measure padded or split batches would "
                f"mislead; {advice}, or export or build the file for these sizes"
            )
        return tuple(asked)
    shared = _shared(contestants)
    if not shared:
        takes = "; ".join(f"{one.name} takes {_takes(one)}" for one in contestants)
        raise ConfigError(f"there is no batch size that all take: {takes}. Bench them one by one")
    return shared


def _shared(contestants: Sequence[Contestant]) -> tuple[int, ...]:
    fixed = dict.fromkeys(one.fixed_batch for one in contestants if one.fixed_batch is not None)
    candidates = tuple(fixed) or _USUAL
    return tuple(size for size in candidates if all(_fits(one, size) for one in contestants))


def _fits(contestant: Contestant, size: int) -> bool:
    if contestant.fixed_batch is not None:
        return size == contestant.fixed_batch
    return contestant.most_images is None or size <= contestant.most_images


def _takes(contestant: Contestant) -> str:
    if contestant.fixed_batch is not None:
        return f"batches of {contestant.fixed_batch}"
    if contestant.most_images is None or contestant.most_images > 1 << 30:
        return "batches of any size"
    return f"batches of up to {contestant.most_images}"
