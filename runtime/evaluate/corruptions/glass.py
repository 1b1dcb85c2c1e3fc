"""Glass blur: pixels are taken from their neighborhood, between two Gaussian blurs.

The original walks over the image from its lower right to its upper left corner, and means to exchange each pixel
with one that it draws near it. Its exchange reads the pixel that it has just written, so it copies:
x[p] = x[p + δ]. Where p + δ was visited before p, what is copied is itself a copy. So each pixel's value comes from
the end of a chain of such steps, and all chains can be followed at once: a table that says where each chain goes
next is looked up in itself until nothing changes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.evaluate.corruptions.blur import gaussian
from runtime.evaluate.corruptions.pixels import truncate

__all__ = ["glass_blur"]


def glass_blur(
    image_HWC: NDArray[np.uint8], sigma: float, reach: int, rounds: int, *, random: np.random.Generator
) -> NDArray[np.uint8]:
    """Blurs, lets every pixel take the value of another near it, `rounds` times, and blurs again.

    Args:
        image_HWC: uint8 RGB.
        sigma: of both blurs, in pixels.
        reach: how far away a value may come from, in pixels: −reach to reach − 1 along each axis.
        rounds: walks over the image.
        random: draws the steps.
    """
    height, width = image_HWC.shape[:2]
    origin = np.arange(height * width)
    for _ in range(rounds):
        origin = origin[_sources(height, width, reach, random)]
    pixels = truncate(gaussian(image_HWC, sigma)).reshape(-1, 3)
    return truncate(gaussian(pixels[origin].reshape(image_HWC.shape), sigma))


def _sources(height: int, width: int, reach: int, random: np.random.Generator) -> NDArray[np.intp]:
    """For each pixel, by its place in the flat image, the place of the value it has after one walk."""
    total = height * width
    places = np.arange(total)
    rows, columns = max(0, height - 2 * reach), max(0, width - 2 * reach)
    steps = random.integers(-reach, reach, size=(rows * columns, 2))
    inner = places.reshape(height, width)[reach + 1 : reach + 1 + rows, reach + 1 : reach + 1 + columns]
    copied = inner + (steps[:, 1] * width + steps[:, 0]).reshape(rows, columns)[::-1, ::-1]
    # The first half of the table is pixels after the walk, the second half, where chains end, before it.
    table = np.concatenate([places + total, places + total])
    first = table[:total].reshape(height, width)
    first[reach + 1 : reach + 1 + rows, reach + 1 : reach + 1 + columns] = np.where(
        copied > inner, copied, copied + total
    )
    while table[:total].min() < total:
        table[:total] = table[table[:total]]
    return table[:total] - total
