"""`Pool`: things that one thread at a time may use."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

__all__ = ["Pool"]

_Thing = TypeVar("_Thing")


class Pool(Generic[_Thing]):
    """Lends things. The one given back last is lent first, since what it uses is still warm."""

    def __init__(self, things: Iterable[_Thing]) -> None:
        """Makes a pool of `things`, at least one."""
        self._free = list(things)
        self._count = len(self._free)
        self._changed = threading.Condition()

    @contextmanager
    def lend(self) -> Iterator[_Thing]:
        """Lends a thing for a while; waits where all are lent."""
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            thing = self._free.pop()
        try:
            yield thing
        finally:
            with self._changed:
                self._free.append(thing)
                self._changed.notify()

    def take_all(self) -> list[_Thing]:
        """Empties the pool, for good, once nothing is lent; returns what was in it."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._free) == self._count)
            things, self._free, self._count = self._free, [], 0
            return things
