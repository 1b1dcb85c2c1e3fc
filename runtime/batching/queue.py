"""`FairQueue`, which decides which images form the next batch. It has no threads and no clock.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["End", "FairQueue", "Outputs", "Part", "Request"]

Outputs: TypeAlias = tuple[NDArray[Any], ...]
"""(N, K) array for each output of the model."""


@dataclass(frozen=True, slots=True, eq=False)
class End:
    """How a request ends: with a result, an error, or neither because its owner canceled it."""

    kind: Literal["answered", "cancelled", "late", "failed"]
    result: Any = None
    error: BaseException | None = None


@dataclass(slots=True, eq=False)
class Request:
    """Images whose results are delivered together."""

    future: Future[Any]
    """Receives the result."""
    count: int
    """Number of images."""
    deadline_s: float
    """Deadline on the clock of `time.monotonic`; infinite without a deadline."""
    finish: Callable[[Outputs], Any]
    """Converts the outputs of all images to the result."""
    opened_s: float
    """Time at which the request was accepted, on the clock of `time.monotonic`."""
    images_NCHW: NDArray[Any] | None = None
    """None until the images are ready, and after the request has ended."""
    taken: int = 0
    """Images that batches have taken."""
    turn: int = 0
    """Images taken in the current turn at the head of the queue."""
    end: End | None = None
    """How the request ends; None while it is open. Only the first end counts."""
    is_counted: bool = False
    """Whether the statistics contain its end."""
    parts: dict[int, Outputs] = field(default_factory=dict)
    """Index of the first image → outputs of a part, in order of arrival."""
    missing: int = field(init=False)
    """Images that are not in `parts` yet."""

    def __post_init__(self) -> None:
        self.missing = self.count

    def joined(self) -> Outputs:
        """Return the outputs of all images, in their order."""
        parts = [self.parts[start] for start in sorted(self.parts)]
        return parts[0] if len(parts) == 1 else tuple(np.concatenate(rows) for rows in zip(*parts, strict=True))


@dataclass(frozen=True, slots=True)
class Part:
    """The images of one request in one batch."""

    request: Request
    images_NCHW: NDArray[Any]
    start: int
    """Index of the first image in the request."""


class FairQueue:
    """A first-in, first-out queue in which a request yields its turn after every `quantum` images.

    A request no larger than the quantum is never overtaken. Between two turns of a larger request,
    every request behind it gets one turn.
    """

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self._requests: OrderedDict[Request, None] = OrderedDict()
        self.images = 0
        """Waiting images."""

    def __bool__(self) -> bool:
        return bool(self._requests)

    @property
    def head(self) -> Request:
        """The next request. The queue must not be empty."""
        return next(iter(self._requests))

    def put(self, request: Request) -> None:
        """Append a request whose images are ready."""
        self._requests[request] = None
        self.images += request.count - request.taken

    def remove(self, request: Request) -> None:
        """Remove a request, if it is in the queue."""
        if request in self._requests:
            del self._requests[request]
            self.images -= request.count - request.taken

    def take(self, max_images: int, parts: list[Part]) -> None:
        """Move the next batch to `parts`: at most `max_images` images, all of the same size.

        If it fails halfway, every request whose images are not in the queue is in `parts`.
        """
        while max_images and self._requests:
            request = self.head
            images_NCHW = request.images_NCHW
            assert images_NCHW is not None
            if parts and images_NCHW.shape[1:] != parts[0].images_NCHW.shape[1:]:
                break
            start, count = request.taken, min(max_images, request.count - request.taken, self._quantum - request.turn)
            parts.append(Part(request, images_NCHW[start : start + count], start))
            max_images -= count
            self._advance(request, count)

    def _advance(self, request: Request, count: int) -> None:
        request.taken += count
        request.turn += count
        self.images -= count
        if request.taken == request.count:
            del self._requests[request]
        elif request.turn == self._quantum:
            request.turn = 0
            self._requests.move_to_end(request)
