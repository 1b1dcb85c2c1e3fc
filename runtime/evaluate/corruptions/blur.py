"""Blurs: Gaussian, defocus, glass, motion and zoom.

Shape suffixes: H height, W width, C channels.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.evaluate.corruptions.pixelwise import truncate

__all__ = [
    "defocus_blur",
    "disk",
    "enlarge",
    "gaussian",
    "gaussian_blur",
    "glass_blur",
    "glass_sources",
    "motion_blur",
    "smear",
    "zoom_blur",
]

_SLACK = 1 / 1024
"""Gray levels added before rounding down: float32 rounding must not turn an even 200 into 199."""


def gaussian(values: NDArray[Any], sigma: float) -> NDArray[np.float32]:
    """Smooth an HW or HWC array with a Gaussian cut off at 4σ; border values are repeated."""
    import cv2

    values = values.astype(np.float32, copy=False)
    side = 2 * int(4 * sigma + 0.5) + 1
    if side == 1:
        return values.copy()
    smoothed: NDArray[np.float32] = cv2.GaussianBlur(
        values, (side, side), sigma, sigmaY=sigma, borderType=cv2.BORDER_REPLICATE
    )
    return smoothed


def gaussian_blur(image_HWC: NDArray[np.uint8], sigma: float) -> NDArray[np.uint8]:
    """Blur with a Gaussian of `sigma` pixels."""
    return truncate(gaussian(image_HWC, sigma))


def defocus_blur(image_HWC: NDArray[np.uint8], radius: float, softness: float) -> NDArray[np.uint8]:
    """Blur with a disk of `radius` pixels; a Gaussian of `softness` pixels smooths its edge."""
    import cv2

    return truncate(cv2.filter2D(image_HWC.astype(np.float32), -1, disk(radius, softness)))


@lru_cache(maxsize=32)
def disk(radius: float, softness: float) -> NDArray[np.float32]:
    """Return the weights of a disk with a soft edge, on at least 17 × 17 pixels.

    As in the original code, the part of a soft edge that would lie outside the array is folded back
    inside, so the weights add up to as much as 1.013.
    """
    import cv2

    reach = max(8, int(radius))
    along = np.arange(-reach, reach + 1)
    inside = (along[:, None] ** 2 + along**2 <= radius**2).astype(np.float32)
    side = 3 if radius <= 8 else 5
    weights: NDArray[np.float32] = cv2.GaussianBlur(inside / inside.sum(), (side, side), softness)
    return weights


def glass_blur(
    image_HWC: NDArray[np.uint8], sigma: float, reach: int, rounds: int, *, random: np.random.Generator
) -> NDArray[np.uint8]:
    """Blur, copy into every pixel the value of a random neighbor `rounds` times, and blur again.

    Args:
        image_HWC: uint8 RGB.
        sigma: standard deviation of both blurs, in pixels.
        reach: distance of a neighbor in pixels: −reach to reach − 1 along each axis.
        rounds: number of passes over the image.
        random: source of the neighbors.
    """
    height, width = image_HWC.shape[:2]
    origin = np.arange(height * width)
    for _ in range(rounds):
        origin = origin[glass_sources(height, width, reach, random)]
    pixels = truncate(gaussian(image_HWC, sigma)).reshape(-1, 3)
    return truncate(gaussian(pixels[origin].reshape(image_HWC.shape), sigma))


def glass_sources(height: int, width: int, reach: int, random: np.random.Generator) -> NDArray[np.intp]:
    """Return the position that each pixel of the flat image gets its value from in one pass.

    The original code walks from the lower right to the upper left corner and intends to swap each
    pixel with a random neighbor. Its swap reads the pixel that it has just written, so it copies
    instead: x[p] = x[p + δ]. If p + δ was visited before p, the copied value is itself a copy. Each
    pixel therefore gets its value from the end of a chain of copies. All chains are followed at
    once here: the table of next positions is looked up in itself until it no longer changes.
    """
    total = height * width
    places = np.arange(total)
    rows, columns = max(0, height - 2 * reach), max(0, width - 2 * reach)
    steps = random.integers(-reach, reach, size=(rows * columns, 2))
    inner = places.reshape(height, width)[reach + 1 : reach + 1 + rows, reach + 1 : reach + 1 + columns]
    copied = inner + (steps[:, 1] * width + steps[:, 0]).reshape(rows, columns)[::-1, ::-1]
    # The first half of the table holds pixels after the pass. The second half, where chains end,
    # holds pixels before it.
    table = np.concatenate([places + total, places + total])
    first = table[:total].reshape(height, width)
    first[reach + 1 : reach + 1 + rows, reach + 1 : reach + 1 + columns] = np.where(
        copied > inner, copied, copied + total
    )
    while table[:total].min() < total:
        table[:total] = table[table[:total]]
    return table[:total] - total


def motion_blur(
    image_HWC: NDArray[np.uint8], radius: int, sigma: float, *, random: np.random.Generator
) -> NDArray[np.uint8]:
    """Blur along a random line within 45 degrees of the horizontal."""
    return smear(image_HWC, radius, sigma, random.uniform(-45, 45))


def smear(image: NDArray[np.uint8], radius: int, sigma: float, degrees: float) -> NDArray[np.uint8]:
    """Average each pixel with those that follow it in one direction; border values are repeated.

    This is ImageMagick's `MotionBlurImage`: one-sided, along a line, with Gaussian weights.

    Args:
        image: uint8, HW or HWC.
        radius: 2 · radius + 1 pixels are averaged.
        sigma: pixel i has weight exp(−i² / 2σ²), divided by the sum of all weights.
        degrees: direction, clockwise from the right.

    Returns:
        uint8 of the same shape, rounded down.
    """
    import cv2

    height, width = image.shape[:2]
    offsets = _smear_offsets(radius, sigma, degrees)
    top, left = max(0, -min(y for y, _ in offsets)), max(0, -min(x for _, x in offsets))
    bottom, right = max(0, max(y for y, _ in offsets)), max(0, max(x for _, x in offsets))
    padded: NDArray[Any] = cv2.copyMakeBorder(image.astype(np.float32), top, bottom, left, right, cv2.BORDER_REPLICATE)
    blurred = np.full(image.shape, _SLACK, np.float32)
    for (y, x), weight in offsets.items():
        shifted = padded[top + y : top + y + height, left + x : left + x + width]
        cv2.scaleAdd(shifted, weight, blurred, blurred)
    return blurred.astype(np.uint8)


def _smear_offsets(radius: int, sigma: float, degrees: float) -> dict[tuple[int, int], float]:
    """Return (rows, columns) → weight."""
    angle = math.radians(degrees)
    weights = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(2 * radius + 1)]
    total = sum(weights)
    offsets: dict[tuple[int, int], float] = {}
    for i, weight in enumerate(weights):
        place = (math.ceil(i * math.sin(angle) - 0.5), math.ceil(i * math.cos(angle) - 0.5))
        offsets[place] = offsets.get(place, 0.0) + weight / total
    return offsets


def zoom_blur(image_HWC: NDArray[np.uint8], last: float, step: float) -> NDArray[np.uint8]:
    """Average the image with views of its center, enlarged by 1, 1 + `step`, … below `last`."""
    factors = np.arange(1, last, step)
    image = image_HWC.astype(np.float32)
    total = 2 * image  # the image itself, and the view at factor 1
    for factor in factors[1:]:
        total += enlarge(image, float(factor))
    total /= len(factors) + 1
    return truncate(total)


def enlarge(image: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    """Return the center of an image, enlarged by `factor` to the size of the whole image.

    The result equals the center of `scipy.ndimage.zoom` with order 1, which maps the first and last
    pixel of the central part to the first and last pixel of the enlarged image. Linear
    interpolation is separable, so rows are interpolated first and columns second.

    Args:
        image: float32, HW or HWC.
        factor: at least 1.
    """
    import cv2

    by_row = _interpolate_rows(image, factor)
    return cv2.transpose(_interpolate_rows(cv2.transpose(by_row), factor))  # type: ignore[no-any-return]


def _interpolate_rows(image: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    """Enlarge along the first axis."""
    lower, weight = _interpolation(image.shape[0], factor)
    shape = (-1, *[1] * (image.ndim - 1))
    result: NDArray[np.float32] = image[np.minimum(lower + 1, image.shape[0] - 1)]
    below = image[lower]
    result -= below
    result *= weight.reshape(shape)
    result += below
    return result


@lru_cache(maxsize=256)
def _interpolation(side: int, factor: float) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Return the source pixel before each pixel of the view, and the weight of the next one."""
    part = math.ceil(side / factor)
    large = round(part * factor)
    positions = (np.arange(side) + (large - side) // 2) * ((part - 1) / max(1, large - 1))
    lower = np.clip(np.floor(positions).astype(np.intp), 0, max(0, part - 2))
    return lower + (side - part) // 2, (positions - lower).astype(np.float32)
