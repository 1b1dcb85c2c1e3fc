"""`FairQueue`: which images of which requests go into the next batch. No threads, no clock.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Answers", "FairQueue", "Part", "Request"]

Answers: TypeAlias = tuple[NDArray[Any], ...]
"""(N, K) of each output of the model."""


@dataclass(slots=True, eq=False)
class Request:
    """Images that are answered together."""

    future: Future[Any] | None
    """Where the answer goes; None once it has gone there."""
    count: int
    """Images."""
    deadline_s: float
    """`time.monotonic` after which no answer is given; infinite without a deadline."""
    finish: Callable[[Answers], Any]
    """Makes the answer of all its images' outputs."""
    opened_s: float
    """`time.monotonic` at which it was let in."""
    images_NCHW: NDArray[Any] | None = None
    """None before they are there, and once it is answered."""
    taken: int = 0
    """Images that batches have taken."""
    turn: int = 0
    """Images taken in its present turn at the head of the queue."""
    parts: dict[int, Answers] = field(default_factory=dict)
    """First image → outputs of a part, in the order in which they came."""
    missing: int = field(init=False)
    """Images that are not in `parts` yet."""

    def __post_init__(self) -> None:
        self.missing = self.count

    def joined(self) -> Answers:
        """The outputs of all its images, in their order."""
        parts = [self.parts[start] for start in sorted(self.parts)]
        return parts[0] if len(parts) == 1 else tuple(np.concatenate(rows) for rows in zip(*parts, strict=True))


@dataclass(frozen=True, slots=True)
class Part:
    """Some images of a request, in one batch."""

    request: Request
    images_NCHW: NDArray[Any]
    start: int
    """Place of the first of them in the request."""


class FairQueue:
    """First in, first out, but a request gives way after each `quantum` of images.

    So one that is no larger than the quantum is never overtaken; a larger one lets each request behind it have a
    turn between two of its own, and gets its own after at most as many requests as wait.
    """

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self._requests: OrderedDict[Request, None] = OrderedDict()
        self.images = 0
        """Images that wait."""

    def __bool__(self) -> bool:
        return bool(self._requests)

    @property
    def head(self) -> Request:
        """The request whose turn it is. The queue must not be empty."""
        return next(iter(self._requests))

    def put(self, request: Request) -> None:
        """Adds a request, whose images are there, at the end."""
        self._requests[request] = None
        self.images += request.count - request.taken

    def remove(self, request: Request) -> None:
        """Takes a request out where it is in."""
        if request in self._requests:
            del self._requests[request]
            self.images -= request.count - request.taken

    def take(self, most: int) -> list[Part]:
        """Takes the next batch: at most `most` images, all of one size."""
        parts: list[Part] = []
        while most and self._requests:
            request = self.head
            images_NCHW = request.images_NCHW
            assert images_NCHW is not None
            if parts and images_NCHW.shape[1:] != parts[0].images_NCHW.shape[1:]:
                break
            start, count = request.taken, min(most, request.count - request.taken, self._quantum - request.turn)
            parts.append(Part(request, images_NCHW[start : start + count], start))
            most -= count
            self._move(request, count)
        return parts

    def _move(self, request: Request, count: int) -> None:
        request.taken += count
        request.turn += count
        self.images -= count
        if request.taken == request.count:
            del self._requests[request]
        elif request.turn == self._quantum:
            request.turn = 0
            self._requests.move_to_end(request)
