"""List the cache folder, and limit its size by removing the least recently used entries.

Each kind of cached file has its own folder in the cache: `engines`, `histograms`. The files of one
entry have the same name up to the first dot. The last use of an entry is the modification time of
its newest file.
"""

from __future__ import annotations

import functools
import logging
import os
import shlex
import stat
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.system.files import cache_folder

__all__ = ["CacheEntry", "entries", "kinds", "limit_bytes", "private_folder", "prune", "remove_leftovers"]

log = logging.getLogger(__name__)

_DEFAULT_GB = 10.0
_LEFTOVER_AGE_S = 3600.0
"""Age in seconds from which a temporary file is considered left behind by a killed process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEntry:
    """One entry of the cache."""

    kind: str
    """Name of its folder."""
    key: str
    """Common name of its files, up to the first dot."""
    files: tuple[Path, ...]
    """Its files, sorted by name."""
    bytes: int
    """Total size of its files."""
    used_s: float
    """Time of its last use, in seconds since the epoch."""

    def remove(self) -> None:
        """Remove its files in reverse order of their names: a sidecar before its engine."""
        for file in reversed(self.files):
            file.unlink(missing_ok=True)


def private_folder(kind: str) -> Path | None:
    """Create the folder for one kind of cached file; return None if it must not be used.

    That is, with a warning, if it cannot be created, belongs to another user, or is writable for
    other users: engines contain native code, and histograms decide about a model's accuracy.
    """
    folder = cache_folder(kind)
    reason = ""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        reason = str(error.strerror or error)
    else:
        if os.name == "posix" and status.st_uid not in (0, os.geteuid()):
            reason = "it belongs to another user; set ADVPROP_CACHE to a folder of your own"
        elif os.name == "posix" and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            reason = f"other users may write to it; run chmod 700 {shlex.quote(str(folder))}"
    if reason:
        _warn_once(f"the cache {folder} is not used: {reason}")
        return None
    return folder


@functools.cache
def _warn_once(message: str) -> None:
    """Log a warning, once in this process."""
    log.warning("%s", message)


def kinds() -> list[str]:
    """Return the names of the existing folders in the cache."""
    base = cache_folder("")
    return sorted(path.name for path in base.iterdir() if path.is_dir()) if base.is_dir() else []


def entries(folder: Path) -> list[CacheEntry]:
    """Return the entries in the folder of one kind, most recently used first.

    Unfinished files and locks are ignored.
    """
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


def prune(found: list[CacheEntry], max_bytes: int) -> list[CacheEntry]:
    """Remove the least recently used entries until the others fit.

    Args:
        found: entries of one or several kinds.
        max_bytes: maximum size of the entries that stay.

    Returns:
        The removed entries.

    Raises:
        OSError: a file cannot be removed.
    """
    total = sum(entry.bytes for entry in found)
    removed = []
    for entry in sorted(found, key=lambda entry: entry.used_s):
        if total <= max_bytes:
            break
        entry.remove()
        removed.append(entry)
        total -= entry.bytes
    return removed


def remove_leftovers(folder: Path) -> None:
    """Remove unfinished files older than an hour, which killed processes left behind."""
    oldest = time.time() - _LEFTOVER_AGE_S
    for path, status in _files(folder):
        if path.name.startswith(".") and status.st_mtime < oldest:
            path.unlink(missing_ok=True)


def limit_bytes() -> int:
    """Return the maximum size of the cache: `ADVPROP_CACHE_GB`, or 10 GB. 0 disables the cache."""
    text = os.environ.get("ADVPROP_CACHE_GB", "")
    try:
        gigabytes = float(text) if text else _DEFAULT_GB
        if gigabytes >= 0:
            return int(gigabytes * 1e9)
    except (ValueError, OverflowError):
        pass
    log.warning("ADVPROP_CACHE_GB must be a number of gigabytes; found %r, using %g", text, _DEFAULT_GB)
    return int(_DEFAULT_GB * 1e9)


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the files of a folder and their status, even if another process removes some."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if path.is_file():
            yield path, status
