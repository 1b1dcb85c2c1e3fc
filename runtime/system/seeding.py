"""Derive seeds that are the same in every process and on every machine."""

from __future__ import annotations

import hashlib
import json

__all__ = ["seed_from"]


def seed_from(*parts: str | int | float) -> int:
    """Return a seed of 128 bits that depends on all parts, in order.

    Python's own `hash` differs between processes. An int and a float of the same value yield
    different seeds.
    """
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")
