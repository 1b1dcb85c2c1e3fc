"""`BatcherCore`: the threads, the lock and the requests of a batcher.

A request is *open* from the moment it is accepted until it ends in exactly one of four ways:
answered, cancelled, late or failed. The first `End` that a thread sets under the lock counts.
Each result is therefore delivered exactly once, to its own request. Futures are completed without
holding the lock, because completing them runs their owners' callbacks.

Any call may fail: memory or threads may run out, and a backend or a callback may raise anything. No
request may stay open then, and no thread may end. Hence three rules:

- State that belongs together changes in statements without calls, after the last call of a block.
- Ending a request (`end`) can be repeated, and is repeated if it fails.
- The loops of the threads catch everything, and their handlers call nothing.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import logging
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
from runtime.batching.queue import End, FairQueue, Outputs, Part, Request
from runtime.batching.statistics import BatcherStats, Counts
from runtime.errors import AdvPropError, DeadlineExceeded, InputError, QueueFull, RunFailed, SessionClosed, first_line
from runtime.system.calls import ATTEMPTS, check_not_forked, in_worker_thread, mark_worker_thread

__all__ = ["BatcherCore"]

log = logging.getLogger(__name__)

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
        self._unready = 0
        """Images of open requests that are not in the queue yet."""
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
            RunFailed: the batcher's threads cannot be started.
        """
        check_not_forked(self._process, "the batcher's model")
        if count > self._max_queued:
            raise InputError(
                f"the request has {count} images, and the queue can hold {self._max_queued}",
                fix="split it, or raise max_queued_images",
            )
        now_s = time.monotonic()
        request = Request(_Future(), count, now_s + timeout_s, finish, now_s)
        request.future.add_done_callback(lambda done: self._on_done(request, done))
        with self._work:
            if self._closing:
                raise SessionClosed("the batcher is closed", fix="load the model again")
            waiting = self._unready + self._queue.images
            if waiting + count > self._max_queued:
                self._counts.refused += 1
                raise QueueFull(
                    f"{waiting} of at most {self._max_queued} images wait: there is no room for {count} more",
                    fix="retry later, or raise max_queued_images",
                )
            self._start_threads()
            if request.deadline_s < self._next_deadline_s:
                self._clock.notify()
            self._open[request] = None
            self._unready += count
            self._counts.submitted += 1
        return request, request.future

    def enqueue(self, request: Request, images_NCHW: NDArray[Any]) -> None:
        """Put an open request into the queue. A request that has ended is ignored."""
        with self._work:
            if request.end is not None:
                return
            if not self._queue or self._queue.images + request.count >= self.max_batch:
                self._work.notify()
            self._queue.put(request)
            request.images_NCHW = images_NCHW
            self._unready -= request.count

    def fail(self, request: Request, error: BaseException) -> None:
        """End a request with a copy of `error`, unless it has ended."""
        end = None
        for _ in ATTEMPTS:
            try:
                if end is None:
                    kind: Any = "late" if isinstance(error, DeadlineExceeded) else "failed"
                    end = End(kind, error=_copy_of(error))
                self._end(request, end)
                return
            except BaseException as failure:
                error = failure

    def is_open(self, request: Request) -> bool:
        """Return whether a request has not ended."""
        return request.end is None

    def stats(self) -> BatcherStats:
        """Return the counts since the batcher was created."""
        with self._work:
            return self._counts.snapshot(len(self._open), self._unready + self._queue.images)

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
            unfinished = () if drain else [request for request in self._open if request.taken < request.count]
            self._work.notify_all()
            self._clock.notify_all()
        for request in unfinished:
            self.fail(request, SessionClosed("the session was closed before this request ran"))
        if wait and not in_worker_thread():  # a worker must not wait for itself
            for thread in self._threads:
                thread.join()

    def _start_threads(self) -> None:
        """Start all threads, or none, if they do not run yet. The caller holds the lock."""
        if self._threads:
            return
        threads: list[threading.Thread] = []
        names = [(f"advprop-batcher-{number}", self._work_loop) for number in range(self._backend.contexts)]
        try:
            for name, target in [*names, ("advprop-deadlines", self._deadline_loop)]:
                thread = threading.Thread(target=target, args=(threads,), name=name, daemon=True)
                self._threads = threads
                thread.start()
                threads.append(thread)
        except BaseException as error:
            self._threads = []  # the started ones end, because they belong to no list in use
            if isinstance(error, Exception):
                raise RunFailed(
                    f"cannot start a thread: {first_line(error)}", fix="raise the limit of threads, or retry later"
                ) from error
            raise

    # A worker forms a batch, runs it, and delivers the results.

    def _work_loop(self, crew: list[threading.Thread]) -> None:
        batch: list[Part] = []
        failure: BaseException | None = None
        buffer: _BatchBuffer | None = None
        while True:
            try:
                while batch:  # the last batch failed: end its requests
                    self.fail(batch[-1].request, failure or RunFailed("the batch could not be run"))
                    batch.pop()
                failure = None
                if buffer is None:
                    mark_worker_thread()
                    buffer = _BatchBuffer()
                self._take_batch(batch, crew)
                if not batch:
                    return
                self._run(batch, buffer)
                batch.clear()
            except BaseException as error:
                failure = error

    def _take_batch(self, batch: list[Part], crew: list[threading.Thread]) -> None:
        """Wait for a batch. An empty one means that there is no more work."""
        with self._work:
            while (wait_s := self._wait_s()) > 0:
                if self._is_done(crew):
                    return
                self._work.wait(min(wait_s, _MAX_WAIT_S))
            self._queue.take(self.max_batch, batch)
            if self._queue:
                self._work.notify()  # another worker may be idle
            self._count_taken(batch)

    def _is_done(self, crew: list[threading.Thread]) -> bool:
        return crew is not self._threads or (self._closing and not self._open)

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
        self._counts.batch_sizes[size] += 1

    def _run(self, parts: list[Part], buffer: _BatchBuffer) -> None:
        images_NCHW = buffer.join([part.images_NCHW for part in parts])
        started_s = time.monotonic()
        outputs = self._backend.run_checked(images_NCHW)
        with self._work:
            self._counts.add_compute(time.monotonic() - started_s)
        start = 0
        for part in parts:
            stop = start + len(part.images_NCHW)
            try:
                whole = len(parts) == 1
                self._deliver(part, tuple(rows if whole else rows[start:stop].copy() for rows in outputs))
            except BaseException as error:
                self.fail(part.request, error)
            start = stop

    def _deliver(self, part: Part, outputs: Outputs) -> None:
        """Store the outputs of a part, and complete its request if they are the last ones."""
        request = part.request
        with self._work:
            if request.end is not None:
                return
            missing = request.missing - len(part.images_NCHW)
            request.parts[part.start] = outputs
            request.missing = missing
            if missing:
                return
        result = request.finish(request.joined())
        if time.monotonic() >= request.deadline_s:
            raise _deadline_error(request)
        end = End("answered", result)
        for _ in ATTEMPTS:
            try:
                self._end(request, end)
                return
            except BaseException:  # noqa: S112  # the next attempt continues where this one failed
                continue

    # One thread ends requests at their deadline, even while a batch runs.

    def _deadline_loop(self, crew: list[threading.Thread]) -> None:
        while True:
            try:
                mark_worker_thread()
                while (due := self._wait_for_overdue(crew)) is not None:
                    for request in due:
                        self.fail(request, _deadline_error(request))
                return
            except BaseException:  # noqa: S112  # the requests that are still due are found again
                continue

    def _wait_for_overdue(self, crew: list[threading.Thread]) -> list[Request] | None:
        """Wait for requests whose deadline has passed; None means that there are no more."""
        with self._clock:
            while True:
                now_s = time.monotonic()
                if due := [request for request in self._open if request.deadline_s <= now_s]:
                    return due
                if self._is_done(crew):
                    return None
                self._next_deadline_s = min((request.deadline_s for request in self._open), default=math.inf)
                self._clock.wait(min(self._next_deadline_s - now_s, _MAX_WAIT_S))

    # The end of a request.

    def _end(self, request: Request, end: End) -> None:
        """End a request, unless it has ended otherwise. Repeat a call that failed, with the same `end`."""
        with self._work:
            if request.end is None:
                request.end = end
            if request.end is not end:
                return
            self._release(request)
        future = request.future
        if future.done() and not future.cancelled():
            return
        alive = future.running() or future.set_running_or_notify_cancel()
        with self._work:
            if not request.is_counted:
                request.is_counted = True
                self._counts.ends[end.kind if alive else "cancelled"] += 1
                if alive and end.kind == "answered":
                    self._counts.answered_images += request.count
        if not alive:
            return
        if end.error is None:
            future.set_result(end.result)
        else:
            future.set_exception(end.error)

    def _release(self, request: Request) -> None:
        """Forget a request that ends. The caller holds the lock."""
        self._queue.remove(request)
        if request in self._open:
            if request.images_NCHW is None:
                self._unready -= request.count
            request.images_NCHW = None
            del self._open[request]
        if self._closing and not self._open:
            self._work.notify_all()
            self._clock.notify_all()

    def _on_done(self, request: Request, done: Future[Any]) -> None:
        """End the request of a future that its owner canceled."""
        if request.end is not None:
            return
        end = None
        for _ in ATTEMPTS:
            try:
                end = end or End("cancelled")
                self._end(request, end)
                return
            except BaseException:  # noqa: S112  # the next attempt continues where this one failed
                continue


class _Future(Future[Any]):
    """A future whose callbacks cannot stop the thread that completes it, or each other."""

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        def call(done: Future[Any]) -> None:
            try:
                fn(done)
            except BaseException as error:
                if not isinstance(error, Exception) and not in_worker_thread():
                    raise  # such as Ctrl-C in the thread of the caller
                log.exception("a callback of a request raised an error")

        super().add_done_callback(call)


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


def _copy_of(error: BaseException) -> AdvPropError:
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
