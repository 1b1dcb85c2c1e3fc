"""Random numbers of an attack on one image, whichever images are attacked beside it."""

from __future__ import annotations

import hashlib
import json

import numpy as np

__all__ = ["generator", "seed_of"]


def seed_of(seed: int, name: str, attack: str, epsilon: float) -> int:
    """Returns a seed for one image: 128 bits that follow from all four, in any process and on any machine.

    Args:
        seed: the run's.
        name: what tells the image from others.
        attack: its name.
        epsilon: in 1/255.
    """
    key = json.dumps([int(seed), name, attack, float(epsilon)])
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little")


def generator(seed: int) -> np.random.Generator:
    """Returns the generator of a seed."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed)))
