"""The L-inf ball around uint8 images, in whole gray levels.

Shape suffixes: N images, H height, W width, C channels.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ConfigError, VerificationError

__all__ = ["bounds", "check_within", "radius_of", "rounded"]

_SLACK = 1e-6
"""So that 8/255·255, which is not 8 in binary, has a radius of 8."""


def radius_of(epsilon: float) -> int:
    """Returns how many gray levels an attack may change a pixel by: images are uint8, so ε counts rounded down.

    Args:
        epsilon: in 1/255.

    Raises:
        ConfigError: it is not from 1 to 255.
    """
    if not math.isfinite(epsilon) or not 1 <= epsilon + _SLACK <= 255 + 2 * _SLACK:
        hint = ""
        if 0 < epsilon < 1:
            hint = f". A smaller change is none in uint8 pixels; {epsilon:g} of 1 would be {255 * epsilon:.3g}"
        raise ConfigError(f"ε is in 1/255, from 1 to 255, such as 4; found {epsilon:g}{hint}")
    return math.floor(epsilon + _SLACK)


def bounds(clean_NHWC: NDArray[np.uint8], radius: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Returns the least and the largest value that each pixel may take: within `radius`, and from 0 to 255."""
    lowest_NHWC = clean_NHWC - np.minimum(clean_NHWC, np.uint8(radius))
    highest_NHWC = clean_NHWC + np.minimum(255 - clean_NHWC, np.uint8(radius))
    return lowest_NHWC, highest_NHWC


def rounded(pixels_NHWC: NDArray[np.floating], clean_NHWC: NDArray[np.uint8], radius: int) -> NDArray[np.uint8]:
    """Returns the nearest uint8 images that are in the ball.

    Args:
        pixels_NHWC: what an attack made, 0 to 255, not rounded.
        clean_NHWC: the images that it was made of.
        radius: in gray levels.
    """
    lowest_NHWC, highest_NHWC = bounds(clean_NHWC, radius)
    nearest_NHWC: NDArray[np.uint8] = np.clip(np.rint(pixels_NHWC), lowest_NHWC, highest_NHWC).astype(np.uint8)
    return nearest_NHWC


def check_within(attacked_NHWC: NDArray[np.uint8], clean_NHWC: NDArray[np.uint8], radius: int, attack: str) -> None:
    """Refuses images that no attack of this ε may make. Every image is checked before a model sees it.

    Raises:
        VerificationError: not uint8 of the same shape, or farther than `radius` from the clean images.
    """
    if attacked_NHWC.dtype != np.uint8 or attacked_NHWC.shape != clean_NHWC.shape:
        raise VerificationError(
            f"the attack {attack} made {attacked_NHWC.dtype} {attacked_NHWC.shape} of uint8 {clean_NHWC.shape}; "
            "nothing was measured. This is a fault of the attack: please report it"
        )
    # Of unsigned numbers, the larger less the smaller: nothing wraps.
    change = np.maximum(attacked_NHWC, clean_NHWC) - np.minimum(attacked_NHWC, clean_NHWC)
    if change.size and change.max() > radius:
        raise VerificationError(
            f"the attack {attack} changed a pixel by {change.max()}/255; ε allows {radius}/255, and nothing was "
            "measured. This is a fault of the attack: please report it"
        )
