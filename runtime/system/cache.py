"""What is in the cache folder, and how it is kept small: what was used longest ago goes first.

Each kind of cached file has a folder of its own below `cache_folder`: `engines`, `histograms`. The files of an entry
share the part of their names before the first dot; an entry was used when its youngest file was written or touched.
"""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.system.files import cache_folder

__all__ = ["CacheEntry", "entries", "kinds", "limit_bytes", "prune", "remove_leftovers"]

log = logging.getLogger(__name__)

_DEFAULT_GB = 10.0
_DEAD_AFTER_S = 3600.0
"""A temporary file that nobody wrote to for so long is of a process that was killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEntry:
    """One cached thing."""

    kind: str
    """Name of its folder."""
    key: str
    """Its files' names up to the first dot."""
    files: tuple[Path, ...]
    """In order of their names."""
    bytes: int
    """Of all its files."""
    used_s: float
    """When it was last used, in seconds since the epoch."""

    def remove(self) -> None:
        """Removes its files, last name first: a sidecar before what it describes."""
        for file in reversed(self.files):
            file.unlink(missing_ok=True)


def kinds() -> list[str]:
    """Returns the names of the folders there are."""
    base = cache_folder("")
    return sorted(path.name for path in base.iterdir() if path.is_dir()) if base.is_dir() else []


def entries(folder: Path) -> list[CacheEntry]:
    """Returns what is in one kind's folder, last used first; unfinished files and locks are left out."""
    files: dict[str, list[tuple[Path, os.stat_result]]] = defaultdict(list)
    for path, status in _files(folder):
        if not path.name.startswith(".") and path.suffix != ".lock":
            files[path.name.split(".")[0]].append((path, status))
    found = [
        CacheEntry(
            kind=folder.name,
            key=key,
            files=tuple(path for path, _ in sorted(group)),
            bytes=sum(status.st_size for _, status in group),
            used_s=max(status.st_mtime for _, status in group),
        )
        for key, group in files.items()
    ]
    return sorted(found, key=lambda entry: -entry.used_s)


def prune(found: list[CacheEntry], limit: int) -> list[CacheEntry]:
    """Removes what was used longest ago until the rest fits.

    Args:
        found: entries, of one kind or several.
        limit: bytes that may stay.

    Returns:
        The entries that were removed.

    Raises:
        OSError: a file cannot be removed.
    """
    total = sum(entry.bytes for entry in found)
    removed = []
    for entry in sorted(found, key=lambda entry: entry.used_s):
        if total <= limit:
            break
        entry.remove()
        removed.append(entry)
        total -= entry.bytes
    return removed


def remove_leftovers(folder: Path) -> None:
    """Removes the unfinished files of processes that were killed an hour ago or more."""
    oldest = time.time() - _DEAD_AFTER_S
    for path, status in _files(folder):
        if path.name.startswith(".") and status.st_mtime < oldest:
            path.unlink(missing_ok=True)


def limit_bytes() -> int:
    """Returns how large the cache may grow: `ADVPROP_CACHE_GB`, or 10 GB; 0 turns it off."""
    text = os.environ.get("ADVPROP_CACHE_GB", "")
    try:
        limit = float(text) if text else _DEFAULT_GB
        return int(limit * 1e9) if limit >= 0 else _refused(text)
    except (ValueError, OverflowError):
        return _refused(text)


def _refused(text: str) -> int:
    log.warning("ADVPROP_CACHE_GB is a number of gigabytes; found %r, used %g", text, _DEFAULT_GB)
    return int(_DEFAULT_GB * 1e9)


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Files and what is known of them; those that others remove meanwhile are passed over."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if path.is_file():
            yield path, status
