"""`Core`: the threads, the lock and the requests of a batcher.

A request is *open* from the moment it is let in until it ends, in exactly one of four ways: answered, cancelled,
late or failed. Whoever ends it first takes its future out of it under the lock (`_forget`), and only that one may
write to the future; so no answer is lost, given twice, or given to another request. Futures are written to outside
the lock, since that runs their owners' callbacks.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from numpy.typing import NDArray

from runtime.backends.base import Backend
from runtime.batching.queue import Answers, FairQueue, Part, Request
from runtime.batching.staging import Staging
from runtime.batching.statistics import BatcherStats, Counts
from runtime.errors import AdvPropError, DeadlineExceeded, InputError, QueueFull, RunFailed, SessionClosed, first_line
from runtime.system.calls import check_process, in_own_thread, mark_own_thread

__all__ = ["Core"]

_LONGEST_WAIT_S = 3600.0
"""Threads wait no longer at once; `Condition.wait` overflows on large times."""


class Core:
    """What the threads of a batcher share. The threads hold this, not the `Batcher`, so that one can be dropped."""

    def __init__(self, backend: Backend, *, max_batch: int, max_delay_s: float, max_queued: int) -> None:
        self._backend = backend
        self.max_batch = max_batch
        self._max_delay_s = max_delay_s
        self._max_queued = max_queued
        self._process = os.getpid()
        # An RLock: garbage collection under the lock may drop the batcher, whose finalizer takes it again.
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

    def open(self, count: int, timeout_s: float, finish: Callable[[Answers], Any]) -> tuple[Request, Future[Any]]:
        """Lets a request of `count` images in; `enqueue` or `fail` must follow.

        Raises:
            QueueFull: too many images wait.
            SessionClosed: closed before.
            InputError: the request can never fit, or this is a forked process.
        """
        check_process(self._process, "the batcher's model")
        if count > self._max_queued:
            raise InputError(
                f"a request of {count} images is more than may wait at all ({self._max_queued}); "
                "split it, or raise max_queued_images"
            )
        now_s = time.monotonic()
        future: Future[Any] = Future()
        with self._work:
            if self._closing:
                raise SessionClosed("the batcher is closed; load the model again")
            if self._waiting + count > self._max_queued:
                self._counts.refused += 1
                raise QueueFull(
                    f"{self._waiting} images wait and at most {self._max_queued} may: no room for {count} more. "
                    "Ask again later, or raise max_queued_images"
                )
            self._start_threads()
            request = Request(future, count, now_s + timeout_s, finish, now_s)
            self._open[request] = None
            self._waiting += count
            self._counts.submitted += 1
            if request.deadline_s < self._next_deadline_s:
                self._clock.notify()
        future.add_done_callback(lambda done: self._note_cancelled(request, done))
        return request, future

    def enqueue(self, request: Request, images_NCHW: NDArray[Any]) -> None:
        """Puts an open request into the queue; one that has ended is left alone."""
        with self._work:
            if request.future is None:
                return
            request.images_NCHW = images_NCHW
            idle = not self._queue
            self._queue.put(request)
            if idle or self._queue.images >= self.max_batch:
                self._work.notify()

    def fail(self, request: Request, error: Exception) -> None:
        """Ends a request with an error like this one, unless it has ended."""
        kind = "late" if isinstance(error, DeadlineExceeded) else "failed"
        with self._work:
            future = self._forget(request)
        if future is not None and self._begin(future, kind):
            future.set_exception(_own_error(error))

    def is_open(self, request: Request) -> bool:
        """Whether anybody still waits for it."""
        return request.future is not None

    def stats(self) -> BatcherStats:
        """What was done so far."""
        with self._work:
            return self._counts.read(len(self._open), self._waiting)

    def stop(self, *, drain: bool, wait: bool) -> None:
        """Lets no more in. The rest is answered if `drain`, else failed but for batches that run already."""
        if os.getpid() != self._process:
            return  # a forked child: the lock may be held by a thread that is not here
        with self._work:
            self._closing = True
            rest = [request for request in self._open if request.taken < request.count]
            self._work.notify_all()
            self._clock.notify_all()
        for request in () if drain else rest:
            self.fail(request, SessionClosed("the session was closed before this request had its turn"))
        if wait and not in_own_thread():  # which the others wait for
            for thread in self._threads:
                thread.join()

    def _start_threads(self) -> None:
        """Starts what is not running yet; the lock is held."""
        if self._threads:
            return
        names = [(f"advprop-batcher-{number}", self._work_on) for number in range(self._backend.contexts)]
        for name, target in [*names, ("advprop-deadlines", self._watch)]:
            self._threads.append(threading.Thread(target=target, name=name, daemon=True))
            self._threads[-1].start()

    # A worker: forms a batch, runs it, delivers the answers.

    def _work_on(self) -> None:
        mark_own_thread()
        staging = Staging()
        while self._work_once(staging):
            pass

    def _work_once(self, staging: Staging) -> bool:
        """Runs a batch; keeps nothing of it alive while the next one is awaited. False means the end."""
        parts = self._next_batch()
        if parts:
            self._run(parts, staging)
        return bool(parts)

    def _next_batch(self) -> list[Part]:
        """Waits for a batch; an empty one means the end."""
        with self._work:
            while (wait_s := self._wait_s()) > 0:
                if self._closing and not self._open:
                    return []
                self._work.wait(min(wait_s, _LONGEST_WAIT_S))
            parts = self._queue.take(self.max_batch)
            self._note_taken(parts)
            if self._queue:
                self._work.notify()  # for another worker, if one is idle
            return parts

    def _wait_s(self) -> float:
        """How long the next batch may still wait for more images."""
        if not self._queue:
            return math.inf
        if self._closing or self._queue.images >= self.max_batch:
            return 0.0
        return self._queue.head.opened_s + self._max_delay_s - time.monotonic()

    def _note_taken(self, parts: Iterable[Part]) -> None:
        now_s = time.monotonic()
        size = 0
        for part in parts:
            size += len(part.images_NCHW)
            if part.start == 0:
                self._counts.waited(now_s - part.request.opened_s)
        self._waiting -= size
        self._counts.batch_sizes[size] += 1

    def _run(self, parts: list[Part], staging: Staging) -> None:
        try:
            outputs = self._backend.run_checked(staging.gather([part.images_NCHW for part in parts]))
        except Exception as error:  # whatever it is, those who wait must be told
            for part in parts:
                self.fail(part.request, error)
            return
        start = 0
        for part in parts:
            stop = start + len(part.images_NCHW)
            whole = len(parts) == 1
            self._add(part, tuple(rows if whole else rows[start:stop].copy() for rows in outputs))
            start = stop

    def _add(self, part: Part, answers: Answers) -> None:
        request = part.request
        with self._work:
            if request.future is None:
                return
            request.parts[part.start] = answers
            request.missing -= len(part.images_NCHW)
            if request.missing:
                return
        try:
            answer = request.finish(request.joined())
        except Exception as error:
            self.fail(request, error)
            return
        if time.monotonic() >= request.deadline_s:
            self.fail(request, _late(request))
            return
        with self._work:
            future = self._forget(request)
        if future is not None and self._begin(future, "answered"):
            future.set_result(answer)

    # The watcher: ends requests at their deadline, also while a batch runs.

    def _watch(self) -> None:
        mark_own_thread()
        while (due := self._due()) is not None:
            for request in due:
                self.fail(request, _late(request))

    def _due(self) -> list[Request] | None:
        """Waits for requests whose deadline has passed; None means the end."""
        with self._clock:
            while True:
                now_s = time.monotonic()
                if due := [request for request in self._open if request.deadline_s <= now_s]:
                    return due
                if self._closing and not self._open:
                    return None
                self._next_deadline_s = min((request.deadline_s for request in self._open), default=math.inf)
                self._clock.wait(min(self._next_deadline_s - now_s, _LONGEST_WAIT_S))

    # Ends.

    def _forget(self, request: Request) -> Future[Any] | None:
        """Ends a request: returns the future that is now the caller's to write, None where it ended before."""
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

    def _begin(self, future: Future[Any], kind: str) -> bool:
        """Counts an end, and tells whether the future may be written: not where its owner was quicker."""
        alive = future.set_running_or_notify_cancel()
        with self._work:
            self._counts.ends[kind if alive else "cancelled"] += 1
        return alive

    def _note_cancelled(self, request: Request, done: Future[Any]) -> None:
        """Called by every future that ends, at once when its owner cancels it."""
        if not done.cancelled():
            return
        with self._work:
            future = self._forget(request)
        if future is not None:
            self._begin(future, "cancelled")


def _own_error(error: Exception) -> AdvPropError:
    """An error of a request's own: one object must not be raised in several threads."""
    if isinstance(error, AdvPropError):
        own = type(error)(*error.args)
        own.__cause__ = error.__cause__
        return own
    own = RunFailed(f"the batch could not be run: {type(error).__name__}: {first_line(error)}")
    own.__cause__ = error
    return own


def _late(request: Request) -> DeadlineExceeded:
    waited_s = time.monotonic() - request.opened_s
    return DeadlineExceeded(
        f"no answer within {request.deadline_s - request.opened_s:.3g} s; it is {waited_s:.3g} s since the request"
    )
