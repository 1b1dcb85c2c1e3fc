"""Fog: a fractal of light over the image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.evaluate.corruptions.pixels import truncate

__all__ = ["fog"]


def fog(image_HWC: NDArray[np.uint8], amount: float, decay: float, *, random: np.random.Generator) -> NDArray[np.uint8]:
    """Adds up to `amount` times white, and dims the sum so that white stays as it was.

    Args:
        image_HWC: uint8 RGB.
        amount: of light, white being 1.
        decay: how much smaller the wobble of each finer level is; lower is rougher.
        random: draws the fractal.
    """
    height, width = image_HWC.shape[:2]
    light_HW = plasma(max(height, width), decay, random)[:height, :width] * np.float32(255 * amount)
    brightest = float(image_HWC.max()) / 255
    result = image_HWC + light_HW[..., None]
    result *= np.float32(brightest / (brightest + amount))
    return truncate(result)


def plasma(side: int, decay: float, random: np.random.Generator) -> NDArray[np.float32]:
    """Returns a fractal by the diamond-square algorithm, wrapped around at its borders.

    Each level doubles the grid: new points in the middle of four old ones, then new points between two old and two
    new ones, are the mean of the four and a wobble. The wobble's amplitude is the square of a number that begins at
    100 and is divided by `decay` from level to level, as in the original.

    Returns:
        float32 in [0, 1], square, its side the next power of two from `side` on, at least 2.
    """
    grid = np.zeros((1, 1), np.float32)
    wobble = 100.0
    while grid.shape[0] < max(2, side):
        grid = _refined(grid, wobble**2, random)
        wobble /= decay
    grid -= grid.min()
    grid /= grid.max()
    return grid


def _refined(grid: NDArray[np.float32], amplitude: float, random: np.random.Generator) -> NDArray[np.float32]:
    """One level of the diamond-square algorithm: (n, n) → (2n, 2n)."""
    side = grid.shape[0]
    noise = random.random((3, side, side), dtype=np.float32)
    noise *= np.float32(2 * amplitude)
    noise -= np.float32(amplitude)
    center, right, below = noise
    down = grid + np.roll(grid, -1, axis=0)
    across = grid + np.roll(grid, -1, axis=1)
    center += (down + np.roll(down, -1, axis=1)) / 4
    right += (across + center + np.roll(center, 1, axis=0)) / 4
    below += (down + center + np.roll(center, 1, axis=1)) / 4
    finer = np.empty((2 * side, 2 * side), np.float32)
    finer[::2, ::2], finer[1::2, 1::2], finer[::2, 1::2], finer[1::2, ::2] = grid, center, right, below
    return finer
