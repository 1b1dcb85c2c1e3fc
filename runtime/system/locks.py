"""A lock between processes, which the operating system takes back from a process that dies."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["file_lock"]

_POLL_S = 0.05


@contextmanager
def file_lock(path: Path, *, patience_s: float, waiting: Callable[[], None] | None = None) -> Iterator[bool]:
    """Holds the lock of the file `path`, which is made and removed again.

    The kernel drops the lock of a process that ends in whatever way, `kill -9` included, so no lock goes stale. One
    whose holder lives and hangs is waited for no longer than `patience_s`.

    Args:
        path: the lock's file; its folder must exist.
        patience_s: how long to wait for another process, or thread.
        waiting: called once where there is something to wait for.

    Yields:
        Whether it is held; False after `patience_s`, and where the file system has no locks or the file cannot be made.
    """
    descriptor = _acquire(path, patience_s, waiting)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            _release(path, descriptor)


def _acquire(path: Path, patience_s: float, waiting: Callable[[], None] | None) -> int | None:
    end = time.monotonic() + patience_s
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
        except OSError:
            return None
        try:
            _try_lock(descriptor)
            if _is_still(path, descriptor):  # not a file that its last holder has just removed
                return descriptor
            os.close(descriptor)
            continue
        except BlockingIOError:
            os.close(descriptor)
        except OSError:  # no locks on this file system
            os.close(descriptor)
            return None
        if time.monotonic() >= end:
            return None
        if waiting is not None:
            waiting()
            waiting = None
        time.sleep(_POLL_S)


def _release(path: Path, descriptor: int) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # Windows removes no open file; an empty file that stays is harmless
        pass
    finally:
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> None:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error

else:
    import fcntl

    def _try_lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
