"""The control: random noise of the same ε. An attack that does no more than this has found nothing.

Shape suffixes: N images, M of them, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from runtime.evaluate.attacks.ball import bounds
from runtime.evaluate.attacks.target import Victim

__all__ = ["noise"]


def noise(victim: Victim, draws_N: Sequence[np.random.Generator], *, draws: int, tick: Callable[[float], None]) -> None:
    """Moves every value of every pixel by +ε or −ε, at random, several times; the worst time counts.

    Signs, and not values between, make the noise as large as ε allows, which is as large as Square attack's changes.

    Args:
        victim: the model and the images; it notes what was found.
        draws_N: a generator an image.
        draws: how many times, unless the model is fooled before.
        tick: told of the share that is done.
    """
    lowest_NHWC, highest_NHWC = bounds(victim.clean_NHWC, victim.radius)
    for number in range(draws):
        rows = victim.rows
        if not len(rows):
            break
        shape = victim.clean_NHWC.shape[1:]
        up_MHWC = np.stack([draws_N[row].integers(0, 2, shape, np.uint8) for row in rows]).astype(bool)
        victim.ask(np.where(up_MHWC, highest_NHWC[rows], lowest_NHWC[rows]), rows)
        tick((number + 1) / draws)
