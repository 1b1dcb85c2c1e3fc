"""Weather: snow, frost, fog and spatter.

The textures of frost are photographs under another license, so they are not part of this project.
They are read from the package `imagecorruptions-imaug`, which contains the original files. The
package is located through its metadata and never imported.

Shape suffixes: H height, W width, C channels.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BackendUnavailable
from runtime.evaluate.corruptions.blur import enlarge, gaussian, smear
from runtime.evaluate.corruptions.pixelwise import truncate

__all__ = ["fog", "frost", "frost_texture", "plasma", "snow", "spatter"]

_FROST_PACKAGE = "imagecorruptions-imaug"
_FROST_TEXTURES = {
    "frost1.png": "ff9f907860bd7a83",
    "frost2.png": "fe211a89b336999c",
    "frost3.png": "2d0d50b4a9bb213f",
    "frost4.jpg": "3f8b91ca1a9fa716",
    "frost5.jpg": "5fc6a19df4a429ba",
}
"""File name → start of its SHA-256. The original code never uses its sixth photograph."""

_FROST_INSTALL = (
    f"Install it with `pip install --no-deps {_FROST_PACKAGE}`. Without --no-deps (or with the extra "
    "`frost`), pip also installs opencv-python, which overwrites the files of opencv-python-headless; either "
    "works then, but removing one breaks the other"
)

_WATER = (175, 238, 238)
"""RGB, pale turquoise."""
_MUD = (63, 42, 20)
"""RGB, brown."""


class _SnowLevel(NamedTuple):
    """Parameters of snow at one severity, in the order of the tables of severities."""

    mean: float
    """Mean of the normal noise that becomes flakes; white is 1."""
    spread: float
    """Standard deviation of that noise."""
    size: float
    """Factor by which the noise is enlarged."""
    threshold: float
    """Noise below this value is removed; white is 1."""
    radius: int
    """Radius of the motion blur, in pixels."""
    sigma: float
    """Standard deviation of the motion blur, in pixels."""
    image_weight: float
    """Weight of the original image; the rest is a whitened copy."""


def snow(image_HWC: NDArray[np.uint8], *level: float, random: np.random.Generator) -> NDArray[np.uint8]:
    """Add wind-blown flakes, and the same flakes upside down, to a partly whitened image.

    Args:
        image_HWC: uint8 RGB.
        level: the fields of `_SnowLevel`.
        random: source of the flakes and the direction of the wind.
    """
    import cv2

    mean, spread, size, threshold, radius, sigma, image_weight = _SnowLevel(*level)  # type: ignore[arg-type]
    noise_HW = random.standard_normal(image_HWC.shape[:2], dtype=np.float32)
    noise_HW *= np.float32(spread)
    noise_HW += np.float32(mean)
    noise_HW = enlarge(noise_HW, size)
    noise_HW[noise_HW < threshold] = 0
    noise_HW *= 255
    flakes_HW = smear(truncate(noise_HW), radius, sigma, random.uniform(-135, -45))
    image = image_HWC.astype(np.float32)
    white_HW = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    white_HW *= 1.5
    white_HW += 127.5
    result = np.maximum(image, white_HW[..., None])
    result *= np.float32(1 - image_weight)
    image *= np.float32(image_weight)
    result += image
    result += (flakes_HW.astype(np.float32) + flakes_HW[::-1, ::-1])[..., None]
    return truncate(result)


def frost(
    image_HWC: NDArray[np.uint8],
    image_weight: float,
    texture_weight: float,
    scale: float,
    *,
    random: np.random.Generator,
) -> NDArray[np.uint8]:
    """Add a random crop of one of five photographs of frozen glass.

    Args:
        image_HWC: uint8 RGB.
        image_weight: weight of the image.
        texture_weight: weight of the photograph.
        scale: factor by which the photograph is resized. If the result is smaller than the image,
            it is enlarged to fit.
        random: source of the photograph and the crop.

    Raises:
        BackendUnavailable: the package with the photographs is missing or contains other files.
    """
    height, width = image_HWC.shape[:2]
    texture = frost_texture(list(_FROST_TEXTURES)[int(random.integers(0, len(_FROST_TEXTURES)))], scale)
    texture = _enlarge_to(texture, height + 1, width + 1)
    top = int(random.integers(0, texture.shape[0] - height))
    left = int(random.integers(0, texture.shape[1] - width))
    part = texture[top : top + height, left : left + width]
    return truncate(image_HWC * np.float32(image_weight) + part * np.float32(texture_weight))


@lru_cache(maxsize=15)
def frost_texture(name: str, scale: float = 1) -> NDArray[np.uint8]:
    """Return one of the photographs of frost, uint8 RGB, resized by `scale`.

    Raises:
        BackendUnavailable: the package with the photographs is missing or contains other files.
    """
    import cv2

    content = _frost_file(name).read_bytes()
    if hashlib.sha256(content).hexdigest()[:16] != _FROST_TEXTURES[name]:
        raise BackendUnavailable(
            f"the frost texture {name} in {_FROST_PACKAGE} differs from the original, so results would not be "
            f"comparable. {_FROST_INSTALL}"
        )
    texture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert texture is not None, name
    if scale != 1:
        texture = cv2.resize(texture, (0, 0), fx=scale, fy=scale)
    return np.ascontiguousarray(texture[..., ::-1])


def _frost_file(name: str) -> Path:
    try:
        path = Path(str(importlib.metadata.distribution(_FROST_PACKAGE).locate_file(f"imagecorruptions/frost/{name}")))
    except importlib.metadata.PackageNotFoundError as error:
        raise BackendUnavailable(
            f"frost needs the textures of the package {_FROST_PACKAGE}, which is not installed. {_FROST_INSTALL}"
        ) from error
    if not path.is_file():
        raise BackendUnavailable(f"the package {_FROST_PACKAGE} does not contain {path}. {_FROST_INSTALL}")
    return path


def _enlarge_to(texture: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Return the texture, enlarged if it is smaller than `height` × `width`."""
    factor = max(height / texture.shape[0], width / texture.shape[1])
    if factor <= 1:
        return texture
    import cv2

    size = (max(width, round(texture.shape[1] * factor)), max(height, round(texture.shape[0] * factor)))
    return cv2.resize(texture, size, interpolation=cv2.INTER_CUBIC)  # type: ignore[no-any-return]


def fog(image_HWC: NDArray[np.uint8], amount: float, decay: float, *, random: np.random.Generator) -> NDArray[np.uint8]:
    """Add a fractal of light, and dim the sum to keep white unchanged.

    Args:
        image_HWC: uint8 RGB.
        amount: maximum added light; white is 1.
        decay: factor between the variations of one level of detail and the next; lower is rougher.
        random: source of the fractal.
    """
    height, width = image_HWC.shape[:2]
    light_HW = plasma(max(height, width), decay, random)[:height, :width] * np.float32(255 * amount)
    brightest = float(image_HWC.max()) / 255
    result = image_HWC + light_HW[..., None]
    result *= np.float32(brightest / (brightest + amount))
    return truncate(result)


def plasma(side: int, decay: float, random: np.random.Generator) -> NDArray[np.float32]:
    """Return a fractal computed with the diamond-square algorithm, with wrap-around borders.

    Each level doubles the grid. New points at the center of four old points, then new points
    between two old and two new points, are the mean of the four plus a random variation. As in the
    original code, the amplitude of the variation is the square of a number that starts at 100 and
    is divided by `decay` at each level.

    Returns:
        Square float32 array in [0, 1]. Its side is a power of two, at least `side` and 2.
    """
    grid = np.zeros((1, 1), np.float32)
    variation = 100.0
    while grid.shape[0] < max(2, side):
        grid = _refine(grid, variation**2, random)
        variation /= decay
    grid -= grid.min()
    grid /= grid.max()
    return grid


def _refine(grid: NDArray[np.float32], amplitude: float, random: np.random.Generator) -> NDArray[np.float32]:
    """Run one level of the diamond-square algorithm: (n, n) → (2n, 2n)."""
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


def spatter(
    image_HWC: NDArray[np.uint8],
    mean: float,
    spread: float,
    sigma: float,
    threshold: float,
    strength: float,
    mud: int,
    *,
    random: np.random.Generator,
) -> NDArray[np.uint8]:
    """Add drops of water or mud.

    Args:
        image_HWC: uint8 RGB.
        mean: mean of the normal noise that becomes drops; white is 1.
        spread: standard deviation of that noise.
        sigma: standard deviation of the Gaussian that smooths the noise, in pixels.
        threshold: smoothed noise below this value is removed.
        strength: for water, how much color the drops add; for mud, the standard deviation of the
            Gaussian that softens the edges, in pixels.
        mud: 1 for mud, 0 for water.
        random: source of the drops.
    """
    noise_HW = random.standard_normal(image_HWC.shape[:2], dtype=np.float32)
    noise_HW *= np.float32(spread)
    noise_HW += np.float32(mean)
    liquid_HW = gaussian(noise_HW, sigma)
    liquid_HW[liquid_HW < threshold] = 0
    image = image_HWC.astype(np.float32)
    if mud:
        cover_HW = gaussian(liquid_HW > threshold, strength)
        cover_HW[cover_HW < 0.8] = 0
        return truncate(image * (1 - cover_HW[..., None]) + cover_HW[..., None] * np.asarray(_MUD, np.float32))
    shine_HW = _shine((liquid_HW * 255).astype(np.uint8))
    return truncate(image + shine_HW[..., None] * (np.float32(strength) * np.asarray(_WATER, np.float32)))


def _shine(liquid_HW: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the brightness of drops in [0, 1], with relief as if lit from the upper left."""
    import cv2

    distance_HW = cv2.distanceTransform(255 - cv2.Canny(liquid_HW, 50, 150), cv2.DIST_L2, 5)
    near_HW = cv2.blur(np.minimum(distance_HW, 20), (3, 3)).astype(np.uint8)
    relief = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    relief_HW = cv2.blur(cv2.filter2D(cv2.equalizeHist(near_HW), cv2.CV_8U, relief), (3, 3))
    shine_HW: NDArray[np.float32] = liquid_HW * relief_HW.astype(np.float32)
    shine_HW /= max(float(shine_HW.max()), 1.0)
    return shine_HW
