"""Square attack, L-inf: random search by logits alone.

Source: Andriushchenko, Croce, Flammarion and Hein, "Square Attack: a query-efficient black-box adversarial attack via
random search" (ECCV 2020), algorithms 1 and 2. It starts from vertical stripes of ±ε and then tries, query by query,
one square of ±ε in each channel somewhere; what makes the margin smaller stays.

Shape suffixes: N images, M of them, H height, W width, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.evaluate.attacks.ball import bounds
from runtime.evaluate.attacks.target import Victim

__all__ = ["INITIAL_SHARE", "share_at", "square"]

INITIAL_SHARE = 0.8
"""Share of the pixels in the first squares: AutoAttack's. The paper has 0.05 for ImageNet's ordinary networks, 0.3 for
some defenses and 0.8 for adversarially trained ones."""

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After these of 10,000 queries the squares' share of the pixels is halved."""


def share_at(query: int, queries: int, initial: float = INITIAL_SHARE) -> float:
    """Returns the share of the pixels that a square covers: the paper's schedule, stretched over the budget.

    Args:
        query: squares tried so far, from 0.
        queries: the budget.
        initial: share of the first squares.
    """
    place = 10_000 * query // queries
    return initial / 2.0 ** sum(place > after for after in _HALVINGS)


def square(
    victim: Victim,
    draws_N: Sequence[np.random.Generator],
    *,
    queries: int,
    initial_share: float = INITIAL_SHARE,
    tick: Callable[[float], None],
) -> None:
    """Attacks the images that still stand, each until it fools the model or was asked about `queries` times.

    Args:
        victim: the model and the images; it notes what was found.
        draws_N: a generator an image, so that neither the others nor their order has a say.
        queries: the budget of an image, the stripes among them.
        initial_share: share of the pixels in the first squares.
        tick: told of the share of the budget that is used.
    """
    clean_NHWC = victim.clean_NHWC
    lowest_NHWC, highest_NHWC = bounds(clean_NHWC, victim.radius)
    best_NHWC = _stripes(lowest_NHWC, highest_NHWC, draws_N)
    rows = victim.rows
    margin_N = np.full(len(clean_NHWC), np.inf)
    margin_N[rows] = victim.ask(best_NHWC[rows], rows)
    _, height, width, _ = clean_NHWC.shape
    for query in range(queries - 1):
        rows = victim.rows
        if not len(rows):
            break
        # Whatever the share, at least one pixel, and never the whole image.
        side = round(math.sqrt(share_at(query, queries, initial_share) * height * width))
        side = min(max(side, 1), max(min(height, width) - 1, 1))
        tried_MHWC = best_NHWC[rows]
        for image_HWC, row in zip(tried_MHWC, rows, strict=True):
            _place_square(image_HWC, lowest_NHWC[row], highest_NHWC[row], side, draws_N[row])
        found_M = victim.ask(tried_MHWC, rows)
        better_M = found_M < margin_N[rows]
        margin_N[rows[better_M]] = found_M[better_M]
        best_NHWC[rows[better_M]] = tried_MHWC[better_M]
        tick((query + 2) / queries)


def _stripes(
    lowest_NHWC: NDArray[np.uint8], highest_NHWC: NDArray[np.uint8], draws_N: Sequence[np.random.Generator]
) -> NDArray[np.uint8]:
    """Every column of every channel goes as far up, or as far down, as it may."""
    _, _, width, channels = lowest_NHWC.shape
    up_N1WC = np.stack([draw.integers(0, 2, (1, width, channels)) for draw in draws_N]).astype(bool)
    return np.where(up_N1WC, highest_NHWC, lowest_NHWC)


def _place_square(
    image_HWC: NDArray[np.uint8],
    lowest_HWC: NDArray[np.uint8],
    highest_HWC: NDArray[np.uint8],
    side: int,
    draw: np.random.Generator,
) -> None:
    """Puts a square somewhere, in place: in each channel as far up, or down, as it may go."""
    height, width, channels = image_HWC.shape
    top, left = draw.integers(0, height - side + 1), draw.integers(0, width - side + 1)
    window = np.s_[top : top + side, left : left + side]
    before, low, high = image_HWC[window].copy(), lowest_HWC[window], highest_HWC[window]
    while True:
        # As the authors' code does: a square that changes nothing is not worth a query. There is always one that does,
        # since ε is at least one gray level.
        image_HWC[window] = np.where(draw.integers(0, 2, channels).astype(bool), high, low)
        if not np.array_equal(image_HWC[window], before):
            return
