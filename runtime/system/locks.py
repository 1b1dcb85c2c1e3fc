"""Locks between processes, which the operating system releases when their holder dies."""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import OutputError

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["file_lock", "reserved_folder"]

log = logging.getLogger(__name__)

_LOCK, _OWNER = ".lock", ".lock.owner"


class _Result(enum.Enum):
    """Result of an attempt to take a lock."""

    HELD = enum.auto()
    BUSY = enum.auto()
    UNAVAILABLE = enum.auto()
    """The lock file cannot be created, or the file system does not support locks."""


@contextlib.contextmanager
def reserved_folder(folder: Path) -> Iterator[None]:
    """Reserve an output folder for this process.

    Two files in the folder, `.lock` and `.lock.owner`, exist while it is reserved. If the file
    system does not support locks, a warning is logged.

    Raises:
        OutputError: another process has reserved it; the message names the process.
    """
    owner = folder / _OWNER
    with _lock(folder / _LOCK, 0, None) as result:
        if result is _Result.BUSY:
            raise OutputError(
                f"{folder} is in use by {_read_owner(owner)}", fix="wait until it ends, or choose another folder"
            )
        if result is _Result.UNAVAILABLE:
            log.warning("cannot lock %s: make sure that no other process writes to it at the same time", folder)
            yield
            return
        with contextlib.suppress(OSError):  # the name is only for the message
            owner.write_text(
                f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}",
                "utf-8",
            )
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                owner.unlink(missing_ok=True)


def _read_owner(path: Path) -> str:
    """Return the description of the process that holds a lock."""
    try:
        text = path.read_text("utf-8", "replace")[:200]
    except OSError:
        text = ""
    return "".join(filter(str.isprintable, text)) or "another process"


@contextlib.contextmanager
def file_lock(path: Path, *, timeout_s: float, on_wait: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold a lock on the file `path`, which is created and removed again.

    The kernel releases the lock of a process that ends, even after `kill -9`, so a lock never
    becomes stale.

    Args:
        path: the lock file.
        timeout_s: how long to wait for another process or thread, in seconds.
        on_wait: called once before waiting.

    Yields:
        Whether the lock is held. It is not held after the timeout, if the folder is missing or not
        writable, or if the file system does not support locks.
    """
    with _lock(path, timeout_s, on_wait) as result:
        yield result is _Result.HELD


@contextlib.contextmanager
def _lock(path: Path, timeout_s: float, on_wait: Callable[[], None] | None) -> Iterator[_Result]:
    from filelock import FileLock

    # Without the fallback to a soft lock, which a killed process would leave behind.
    lock = FileLock(path, mode=0o600, fallback_to_soft=False)
    result = _acquire(lock, timeout_s, on_wait) if path.parent.is_dir() else _Result.UNAVAILABLE
    try:
        yield result
    finally:
        if result is _Result.HELD:
            # Removed while the lock is held: a waiter notices that its open file is gone, and
            # creates a new one.
            # Windows cannot remove an open file; the empty file does no harm.
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            lock.release()


def _acquire(lock: BaseFileLock, timeout_s: float, on_wait: Callable[[], None] | None) -> _Result:
    from filelock import Timeout

    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if on_wait is not None:
                on_wait()
            lock.acquire(timeout=timeout_s)
    except Timeout:
        return _Result.BUSY
    except OSError:
        return _Result.UNAVAILABLE
    return _Result.HELD
