"""Seeded damage: changed bytes, and nonsense in nested values."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

__all__ = ["NUMBERS", "TEXTS", "damaged", "hostile_json", "number", "plain", "tampered", "text"]

TEXTS = (
    "",
    "../w",
    "/etc/hostname",
    "a\0b",
    ".",
    "input",
    "logits",
    "1:2:3",
    "\x1b[2J",
    "[/]",
    "\ud800",
    "ä犬",
    "x" * 3000,
)
NUMBERS = (0, 1, -1, 2, 7, 255, 10**9, 2**31, 2**62, -(2**63), 2**63 - 1, 10**400)
FLOATS = (0.0, -0.5, 1e-300, 1e300, 32.5, float("inf"), float("-inf"), float("nan"))


def text(random: Random) -> str:
    return (
        random.choice(TEXTS)
        if random.random() < 0.7
        else "".join(random.choices("ab:/.=x09-\n[", k=random.randrange(12)))
    )


def number(random: Random) -> int:
    """Return an integer that fits into 64 bits."""
    return random.choice(NUMBERS[:-1]) if random.random() < 0.7 else random.randrange(-(2**63), 2**63)


def plain(random: Random, depth: int = 2) -> Any:
    """Return any value that JSON has, NaN included."""
    kind = random.randrange(8 if depth else 6)
    if kind == 6:
        return [plain(random, depth - 1) for _ in range(random.randrange(4))]
    if kind == 7:
        return {text(random): plain(random, depth - 1) for _ in range(random.randrange(4))}
    values = (None, random.random() < 0.5, number(random), random.choice(NUMBERS), random.choice(FLOATS), text(random))
    return values[kind]


def damaged(random: Random, content: bytes) -> bytes:
    """Return a copy with some bytes changed, removed, repeated or inserted."""
    result = bytearray(content)
    for _ in range(random.randint(1, 4)):
        place, span = random.randrange(len(result) + 1), random.randint(1, 64)
        kind = random.choice(["flip", "flip", "cut", "drop", "repeat", "insert", "set"])
        if kind == "flip" and place < len(result):
            result[place] ^= 1 << random.randrange(8)
        elif kind == "cut":
            del result[place:]
        elif kind == "drop":
            del result[place : place + span]
        elif kind == "repeat":
            result[place:place] = result[place : place + span] * random.randint(1, 50)
        elif kind == "insert":
            result[place:place] = random.randbytes(random.randrange(16))
        elif kind == "set":
            result[place : place + 4] = random.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"9999"])
    return bytes(result)


def tampered(random: Random, value: Any) -> Any:
    """Return a copy of nested lists and dicts with some values replaced, removed or repeated."""
    whole = [copy.deepcopy(value)]
    for _ in range(random.randint(1, 3)):
        holder: Any = whole
        place: Any = 0
        while isinstance(holder[place], dict | list) and holder[place] and random.random() < 0.85:
            holder = holder[place]
            place = random.choice(list(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
        kind = random.randrange(4)
        if kind == 0 and holder is not whole:
            del holder[place]
        elif kind == 1 and isinstance(holder, dict):
            holder[text(random)] = holder[place]
        elif kind == 1:
            holder.append(holder[place])
        else:
            holder[place] = plain(random)
    return whole[0]


def hostile_json(random: Random, content: Any) -> bytes:
    """Return JSON with damaged bytes, nonsense in its fields, deep nesting or a long number."""
    kind = random.randrange(20)
    if kind == 0:
        return random.choice([b"[" * 100_000, b'{"a":' * 50_000, b"9" * 6000, b"", b"\xff\xfe", b"null", b"NaN"])
    if kind < 6:
        return damaged(random, json.dumps(content).encode())
    return json.dumps(tampered(random, content)).encode()
