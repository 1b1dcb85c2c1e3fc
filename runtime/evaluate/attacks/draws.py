"""Random numbers of an attack on one image, whichever images are attacked beside it."""

from __future__ import annotations

import numpy as np

from runtime.system.seeding import seed_from

__all__ = ["generator", "seed_of"]


def seed_of(seed: int, name: str, attack: str, epsilon: float) -> int:
    """Returns a seed for one image: 128 bits that follow from all four, in any process and on any machine.

    Args:
        seed: the run's.
        name: what tells the image from others.
        attack: its name.
        epsilon: in 1/255.
    """
    return seed_from(int(seed), name, attack, float(epsilon))


def generator(seed: int) -> np.random.Generator:
    """Returns the generator of a seed."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed)))
