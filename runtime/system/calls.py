"""`CallTracker`, which waits for calls in flight on close, and checks for forked processes."""

from __future__ import annotations

import os
import threading
from types import TracebackType

from runtime.errors import InputError, SessionClosed

__all__ = ["ATTEMPTS", "CallTracker", "check_not_forked", "in_worker_thread", "mark_worker_thread"]

ATTEMPTS = (1, 2, 3, 4, 5)
"""Attempts at work that must be done even if memory runs out or Ctrl-C arrives in the middle of it."""


class CallTracker:
    """Counts the calls in flight, and waits for them on close. Thread-safe.

    with tracker.track() as call:
        outputs = run(batch)
        call.images = len(batch)
    """

    def __init__(self, what: str) -> None:
        """
        Args:
            what: name of the tracked object, for error messages.
        """
        self._what = what
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._closed = False
        self.in_flight = 0
        """Calls in flight."""
        self.completed = 0
        """Calls that returned without an error."""
        self.images = 0
        """Images of the completed calls."""
        self.failed = 0
        """Calls that raised an error."""

    @property
    def closed(self) -> bool:
        """Whether new calls are rejected. Earlier calls may still be in flight."""
        return self._closed

    def track(self) -> TrackedCall:
        """Return a context manager for one call.

        Entering it raises SessionClosed after `close`, and InputError in a process forked after the
        tracker was created.
        """
        return TrackedCall(self)

    def close(self) -> bool:
        """Reject new calls and wait for those in flight.

        In a forked process it does not wait, because the threads of the calls do not exist there.

        Returns:
            Whether this call closed the tracker; False if it was closed before.
        """
        if os.getpid() != self._process:
            self._closed = True
            return False
        with self._changed:
            first, self._closed = not self._closed, True
            self._changed.wait_for(lambda: self.in_flight == 0)
            return first

    def _enter(self) -> None:
        check_not_forked(self._process, self._what)
        with self._changed:
            if self._closed:
                raise SessionClosed(f"{self._what} is closed", fix="load it again")
            self.in_flight += 1

    def _leave(self, images: int, *, failed: bool) -> None:
        with self._changed:
            self.in_flight -= 1
            if failed:
                self.failed += 1
            else:
                self.completed += 1
                self.images += images
            if self._closed:
                self._changed.notify_all()


class TrackedCall:
    """One call in flight."""

    __slots__ = ("_tracker", "images")

    def __init__(self, tracker: CallTracker) -> None:
        self._tracker = tracker
        self.images = 0
        """Images of the call; set before it returns."""

    def __enter__(self) -> TrackedCall:
        self._tracker._enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tracker._leave(self.images, failed=kind is not None)


def check_not_forked(process: int, what: str) -> None:
    """Raise InputError if this process was forked from `process`.

    The threads of ONNX Runtime, CUDA and the batcher do not survive a fork, and a call would wait
    for them forever.

    Args:
        process: id of the process that loaded the object.
        what: name of the object.
    """
    if os.getpid() != process:
        raise InputError(
            f"{what} was loaded in process {process}, and process {os.getpid()} is a fork of it; threads do not "
            "survive a fork",
            fix="load it in this process, or start processes with the spawn method",
        )


_this_thread = threading.local()


def mark_worker_thread() -> None:
    """Mark the current thread as a worker of a batcher or session."""
    _this_thread.is_worker = True


def in_worker_thread() -> bool:
    """Return whether the current thread is a worker, which must not wait for itself."""
    return getattr(_this_thread, "is_worker", False)
