"""What contestants are called, in tables and file names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from runtime.errors import ConfigError

__all__ = ["names_of", "slug", "unused"]


def names_of(paths: Sequence[Path]) -> dict[Path, str]:
    """What each is called, in file names too: its stem; its whole name or folder too where that is another's.

    Raises:
        ConfigError: two cannot be told apart.
    """
    candidates: tuple[Callable[[Path], str], ...] = (
        lambda path: path.stem,
        lambda path: path.name,
        lambda path: f"{path.resolve().parent.name}-{path.name}",
        lambda path: "-".join(path.resolve().parts[1:]),
    )
    named: dict[Path, str] = {}
    for path in paths:
        for candidate in candidates:
            slugs = Counter(slug(candidate(other)) for other in paths)
            if slugs[slug(candidate(path))] == 1:
                named[path] = slug(candidate(path))
                break
    if len(set(named.values())) < len(paths):
        raise ConfigError("two of the files cannot be told apart by their names; rename one")
    return named


def slug(text: str) -> str:
    """Returns `text` as it can be part of a file's name."""
    return re.sub(r"[^\w.-]", "_", text)


def unused(name: str, known: Collection[str]) -> str:
    """Returns `name`, longer where it is taken."""
    while name in known:
        name += "-peer"
    return name
