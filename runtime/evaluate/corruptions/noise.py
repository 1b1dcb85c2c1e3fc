"""Gaussian, shot, impulse and speckle noise: every value of every channel is drawn by itself."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.evaluate.corruptions.pixels import truncate

__all__ = ["gaussian_noise", "impulse_noise", "shot_noise", "speckle_noise"]


def gaussian_noise(image_HWC: NDArray[np.uint8], sigma: float, *, random: np.random.Generator) -> NDArray[np.uint8]:
    """Adds normal noise of standard deviation `sigma`, white being 1."""
    noise_HWC = random.standard_normal(image_HWC.shape, dtype=np.float32)
    noise_HWC *= np.float32(255 * sigma)
    noise_HWC += image_HWC
    return truncate(noise_HWC)


def shot_noise(image_HWC: NDArray[np.uint8], photons: float, *, random: np.random.Generator) -> NDArray[np.uint8]:
    """Counts photons, Poisson distributed, `photons` of them being white."""
    means = np.arange(256) * (photons / 255)
    counts_HWC = random.poisson(means[image_HWC]).astype(np.float32)
    counts_HWC *= np.float32(255 / photons)
    return truncate(counts_HWC)


def impulse_noise(image_HWC: NDArray[np.uint8], share: float, *, random: np.random.Generator) -> NDArray[np.uint8]:
    """Sets `share` of the values to black or white, with equal chances."""
    drawn_HWC = random.random(image_HWC.shape, dtype=np.float32)
    result_HWC = image_HWC.copy()
    result_HWC[drawn_HWC < share] = 255
    result_HWC[drawn_HWC < share / 2] = 0
    return result_HWC


def speckle_noise(image_HWC: NDArray[np.uint8], sigma: float, *, random: np.random.Generator) -> NDArray[np.uint8]:
    """Adds normal noise whose standard deviation is `sigma` times the value."""
    noise_HWC = random.standard_normal(image_HWC.shape, dtype=np.float32)
    noise_HWC *= np.float32(sigma)
    noise_HWC += 1
    noise_HWC *= image_HWC
    return truncate(noise_HWC)
