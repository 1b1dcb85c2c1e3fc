"""`BatcherCore`: the threads, the lock and the requests of a batcher.

A request is *open* from the moment it is accepted until it ends in exactly one of four ways:
answered, cancelled, late or failed. The first thread that ends it takes the future out of the
request while it holds the lock (`_close`), and only that thread may complete the future. Each
result is therefore delivered exactly once, to its own request. Futures are completed without
holding the lock, because completing them runs their owners' callbacks.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend
from runtime.batching.queue import FairQueue, Outputs, Part, Request
from runtime.batching.statistics import BatcherStats, Counts
from runtime.errors import AdvPropError, DeadlineExceeded, InputError, QueueFull, RunFailed, SessionClosed, first_line
from runtime.system.calls import check_not_forked, in_worker_thread, mark_worker_thread

__all__ = ["BatcherCore"]

_MAX_WAIT_S = 3600.0
"""Longest single wait of a thread: `Condition.wait` overflows for large values."""


class BatcherCore:
    """The state that the threads of a batcher share.

    The threads hold a reference to this object and not to the `Batcher`, which can therefore be
    garbage-collected.
    """

    def __init__(self, backend: Backend, *, max_batch: int, max_delay_s: float, max_queued: int) -> None:
        self._backend = backend
        self.max_batch = max_batch
        self._max_delay_s = max_delay_s
        self._max_queued = max_queued
        self._process = os.getpid()
        # Reentrant: garbage collection may run the batcher's finalizer while the lock is held.
        lock = threading.RLock()
        self._work = threading.Condition(lock)
        self._clock = threading.Condition(lock)
        self._queue = FairQueue(max_batch)
        self._open: dict[Request, None] = {}
        self._waiting = 0
        self._next_deadline_s = math.inf
        self._closing = False
        self._counts = Counts()
        self._threads: list[threading.Thread] = []

    def open(self, count: int, timeout_s: float, finish: Callable[[Outputs], Any]) -> tuple[Request, Future[Any]]:
        """Accept a request of `count` images. Call `enqueue` or `fail` afterwards.

        Raises:
            QueueFull: too many images wait.
            SessionClosed: the batcher is closed.
            InputError: the request can never fit, or this is a forked process.
        """
        check_not_forked(self._process, "the batcher's model")
        if count > self._max_queued:
            raise InputError(
                f"the request has {count} images, and the queue can hold {self._max_queued}",
                fix="split it, or raise max_queued_images",
            )
        now_s = time.monotonic()
        future: Future[Any] = Future()
        with self._work:
            if self._closing:
                raise SessionClosed("the batcher is closed", fix="load the model again")
            if self._waiting + count > self._max_queued:
                self._counts.refused += 1
                raise QueueFull(
                    f"{self._waiting} of at most {self._max_queued} images wait: there is no room for {count} more",
                    fix="retry later, or raise max_queued_images",
                )
            self._start_threads()
            request = Request(future, count, now_s + timeout_s, finish, now_s)
            self._open[request] = None
            self._waiting += count
            self._counts.submitted += 1
            if request.deadline_s < self._next_deadline_s:
                self._clock.notify()
        future.add_done_callback(lambda done: self._on_done(request, done))
        return request, future

    def enqueue(self, request: Request, images_NCHW: NDArray[Any]) -> None:
        """Put an open request into the queue. A request that has ended is ignored."""
        with self._work:
            if request.future is None:
                return
            request.images_NCHW = images_NCHW
            idle = not self._queue
            self._queue.put(request)
            if idle or self._queue.images >= self.max_batch:
                self._work.notify()

    def fail(self, request: Request, error: Exception) -> None:
        """End a request with a copy of `error`, unless it has ended."""
        end = "late" if isinstance(error, DeadlineExceeded) else "failed"
        with self._work:
            future = self._close(request)
        if future is not None and self._begin_result(future, end):
            future.set_exception(_copy_of(error))

    def is_open(self, request: Request) -> bool:
        """Return whether a request has not ended."""
        return request.future is not None

    def stats(self) -> BatcherStats:
        """Return the counts since the batcher was created."""
        with self._work:
            return self._counts.snapshot(len(self._open), self._waiting)

    def stop(self, *, drain: bool, wait: bool) -> None:
        """Reject new requests.

        Args:
            drain: complete the open requests. Otherwise they fail, except those in a running batch.
            wait: return when all requests have ended.
        """
        if os.getpid() != self._process:
            return  # a forked child: a thread that does not exist here may hold the lock
        with self._work:
            self._closing = True
            unfinished = [request for request in self._open if request.taken < request.count]
            self._work.notify_all()
            self._clock.notify_all()
        for request in () if drain else unfinished:
            self.fail(request, SessionClosed("the session was closed before this request ran"))
        if wait and not in_worker_thread():  # a worker must not wait for itself
            for thread in self._threads:
                thread.join()

    def _start_threads(self) -> None:
        """Start the threads if they do not run yet. The caller holds the lock."""
        if self._threads:
            return
        names = [(f"advprop-batcher-{number}", self._work_loop) for number in range(self._backend.contexts)]
        for name, target in [*names, ("advprop-deadlines", self._deadline_loop)]:
            self._threads.append(threading.Thread(target=target, name=name, daemon=True))
            self._threads[-1].start()

    # A worker forms a batch, runs it, and delivers the results.

    def _work_loop(self) -> None:
        mark_worker_thread()
        buffer = _BatchBuffer()
        while self._run_next_batch(buffer):
            pass

    def _run_next_batch(self, buffer: _BatchBuffer) -> bool:
        """Run one batch, and return False when there is no more work.

        This is a separate function because its local variables would otherwise keep the batch alive
        while the worker waits for the next one.
        """
        parts = self._next_batch()
        if parts:
            self._run(parts, buffer)
        return bool(parts)

    def _next_batch(self) -> list[Part]:
        """Wait for a batch. An empty one means that there is no more work."""
        with self._work:
            while (wait_s := self._wait_s()) > 0:
                if self._closing and not self._open:
                    return []
                self._work.wait(min(wait_s, _MAX_WAIT_S))
            parts = self._queue.take(self.max_batch)
            self._count_taken(parts)
            if self._queue:
                self._work.notify()  # another worker may be idle
            return parts

    def _wait_s(self) -> float:
        """Return the remaining time that the next batch may wait for more images, in seconds."""
        if not self._queue:
            return math.inf
        if self._closing or self._queue.images >= self.max_batch:
            return 0.0
        return self._queue.head.opened_s + self._max_delay_s - time.monotonic()

    def _count_taken(self, parts: Iterable[Part]) -> None:
        now_s = time.monotonic()
        size = 0
        for part in parts:
            size += len(part.images_NCHW)
            if part.start == 0:
                self._counts.add_wait(now_s - part.request.opened_s)
        self._waiting -= size
        self._counts.batch_sizes[size] += 1

    def _run(self, parts: list[Part], buffer: _BatchBuffer) -> None:
        try:
            outputs = self._backend.run_checked(buffer.join([part.images_NCHW for part in parts]))
        except Exception as error:  # every error must reach the owners of the requests
            for part in parts:
                self.fail(part.request, error)
            return
        start = 0
        for part in parts:
            stop = start + len(part.images_NCHW)
            whole = len(parts) == 1
            self._deliver(part, tuple(rows if whole else rows[start:stop].copy() for rows in outputs))
            start = stop

    def _deliver(self, part: Part, outputs: Outputs) -> None:
        """Store the outputs of a part, and complete its request if they are the last ones."""
        request = part.request
        with self._work:
            if request.future is None:
                return
            request.parts[part.start] = outputs
            request.missing -= len(part.images_NCHW)
            if request.missing:
                return
        try:
            result = request.finish(request.joined())
        except Exception as error:
            self.fail(request, error)
            return
        if time.monotonic() >= request.deadline_s:
            self.fail(request, _deadline_error(request))
            return
        with self._work:
            future = self._close(request)
        if future is not None and self._begin_result(future, "answered"):
            future.set_result(result)

    # One thread ends requests at their deadline, even while a batch runs.

    def _deadline_loop(self) -> None:
        mark_worker_thread()
        while (due := self._wait_for_overdue()) is not None:
            for request in due:
                self.fail(request, _deadline_error(request))

    def _wait_for_overdue(self) -> list[Request] | None:
        """Wait for requests whose deadline has passed; None means that there are no more."""
        with self._clock:
            while True:
                now_s = time.monotonic()
                if due := [request for request in self._open if request.deadline_s <= now_s]:
                    return due
                if self._closing and not self._open:
                    return None
                self._next_deadline_s = min((request.deadline_s for request in self._open), default=math.inf)
                self._clock.wait(min(self._next_deadline_s - now_s, _MAX_WAIT_S))

    # The end of a request.

    def _close(self, request: Request) -> Future[Any] | None:
        """End a request. Return its future for the caller to complete, or None if it had ended."""
        future, request.future = request.future, None
        if future is None:
            return None
        del self._open[request]
        self._queue.remove(request)
        self._waiting -= request.count - request.taken
        request.images_NCHW = None
        if self._closing and not self._open:
            self._work.notify_all()
            self._clock.notify_all()
        return future

    def _begin_result(self, future: Future[Any], end: str) -> bool:
        """Count how a request ended. Return False if its owner has canceled the future."""
        alive = future.set_running_or_notify_cancel()
        with self._work:
            self._counts.ends[end if alive else "cancelled"] += 1
        return alive

    def _on_done(self, request: Request, done: Future[Any]) -> None:
        """End the request of a future that its owner canceled."""
        if not done.cancelled():
            return
        with self._work:
            future = self._close(request)
        if future is not None:
            self._begin_result(future, "cancelled")


class _BatchBuffer:
    """Buffer for the batches of one worker. Reusing it avoids the page faults of new memory."""

    def __init__(self) -> None:
        self._memory_NCHW = np.empty((0,))

    def join(self, parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Return the images of all parts as one array, which the next call may overwrite."""
        if len(parts) == 1:
            return parts[0]
        count = sum(len(part_NCHW) for part_NCHW in parts)
        memory_NCHW = self._memory_NCHW
        if memory_NCHW.shape[1:] != parts[0].shape[1:] or len(memory_NCHW) < count:
            memory_NCHW = self._memory_NCHW = np.empty((count, *parts[0].shape[1:]), parts[0].dtype)
        return np.concatenate(parts, out=memory_NCHW[:count])


def _copy_of(error: Exception) -> AdvPropError:
    """Return a copy of `error` as an AdvPropError: threads must not raise the same object."""
    if isinstance(error, AdvPropError):
        own = copy.copy(error)
        own.__cause__ = error.__cause__
        return own
    failed = RunFailed(f"the batch could not be run: {type(error).__name__}: {first_line(error)}")
    failed.__cause__ = error
    return failed


def _deadline_error(request: Request) -> DeadlineExceeded:
    waited_s = time.monotonic() - request.opened_s
    return DeadlineExceeded(
        f"the deadline of {request.deadline_s - request.opened_s:.3g} s passed; the request is {waited_s:.3g} s old"
    )
