"""`file_lock`, a lock between processes that the operating system releases when its holder dies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["file_lock"]


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
    from filelock import FileLock

    # Without the fallback to a soft lock, which a killed process would leave behind.
    lock = FileLock(path, mode=0o600, fallback_to_soft=False)
    held = path.parent.is_dir() and _acquire(lock, timeout_s, on_wait)
    try:
        yield held
    finally:
        if held:
            # Removed while the lock is held: a waiter notices that its open file is gone, and
            # creates a new one.
            # Windows cannot remove an open file; the empty file does no harm.
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            lock.release()


def _acquire(lock: BaseFileLock, timeout_s: float, on_wait: Callable[[], None] | None) -> bool:
    from filelock import Timeout

    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if on_wait is not None:
                on_wait()
            lock.acquire(timeout=timeout_s)
    except OSError:  # a Timeout is one too
        return False
    return True
