"""Who may go in: `Gate` lets calls of several threads through until it is closed, and closing waits for those inside;
a forked process is told that it may not; and a thread of ours is told that it must not wait for itself."""

from __future__ import annotations

import os
import threading

from runtime.errors import InputError, SessionClosed

__all__ = ["Gate", "check_process", "in_own_thread", "mark_own_thread"]


class Gate:
    """Counts the calls inside, so that nothing is freed under them."""

    def __init__(self, what: str) -> None:
        """`what` names the thing behind the gate, for messages."""
        self._what = what
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._closed = False
        self.inside = 0
        """Calls inside now."""
        self.calls = 0
        """Calls that ended well."""
        self.images = 0
        """Their images."""
        self.failed = 0
        """Calls that raised an error."""

    @property
    def closed(self) -> bool:
        """Whether it is closed; calls may still be inside."""
        return self._closed

    def enter(self) -> None:
        """Goes in. Raises SessionClosed, or InputError in a process forked from the one that made the gate."""
        check_process(self._process, self._what)
        with self._changed:
            if self._closed:
                raise SessionClosed(f"{self._what} is closed; load it again")
            self.inside += 1

    def leave(self, images: int, *, failed: bool) -> None:
        """Comes out, with `images` answered unless it failed."""
        with self._changed:
            self.inside -= 1
            if failed:
                self.failed += 1
            else:
                self.calls += 1
                self.images += images
            if self._closed:
                self._changed.notify_all()

    def close(self) -> bool:
        """Lets no more calls in and waits for those inside; tells whether this call was the first to close it.

        In a forked process it waits for nothing, since the threads inside are not there.
        """
        if os.getpid() != self._process:
            self._closed = True
            return False
        with self._changed:
            first, self._closed = not self._closed, True
            self._changed.wait_for(lambda: self.inside == 0)
            return first


def check_process(process: int, what: str) -> None:
    """Raises InputError where this process is not `process` but a fork of it.

    The threads of ONNX Runtime, of CUDA and of the batcher do not come along in a fork: a call would wait for ever.
    """
    if os.getpid() != process:
        raise InputError(
            f"{what} was loaded in process {process}, of which this one, {os.getpid()}, is a fork; threads do not "
            "come along. Load it here, or start processes by spawn"
        )


_here = threading.local()


def mark_own_thread() -> None:
    """Says that this thread works for a batcher or session."""
    _here.own = True


def in_own_thread() -> bool:
    """Whether this is such a thread, as it is in the callback of a future: then `close` must not wait for it."""
    return getattr(_here, "own", False)
