"""`Decoder`, which decodes and preprocesses the images of requests in its own threads.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

from numpy.typing import NDArray

from runtime.batching.batcher import Batcher
from runtime.batching.queue import Request
from runtime.errors import AdvPropError, RunFailed, SessionClosed, first_line
from runtime.system.calls import ATTEMPTS, mark_worker_thread
from runtime.system.decode import ImageLike

__all__ = ["Decoder"]


class Decoder:
    """Prepares the images of reserved requests.

    The batcher's queue limits the number of waiting requests. The threads start on first use.
    """

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._lock = threading.Lock()
        self._pool: Executor | None = None
        self._closed = False

    def start(
        self,
        request: Request,
        images: Sequence[ImageLike],
        prepare: Callable[[Sequence[ImageLike]], NDArray[Any]],
    ) -> None:
        """Call `prepare` for the images of a request in a thread. An error ends the request."""
        failure: BaseException | None = None
        for _ in ATTEMPTS:
            try:
                if failure is None:
                    self._threads().submit(self._prepare, request, images, prepare)
                else:
                    self._batcher.fail(request, self._reason(failure))
                break
            except BaseException as error:
                failure = error
        if failure is not None and not isinstance(failure, Exception):
            raise failure

    def close(self) -> None:
        """Wait until all started requests are prepared. No request may be started afterwards."""
        with self._lock:
            self._closed = True
            pool = self._pool
        if pool is not None:
            pool.shutdown()

    def _reason(self, failure: BaseException) -> AdvPropError:
        if self._closed:
            return SessionClosed("the session was closed before this request ran")
        return RunFailed(
            f"cannot start a thread: {first_line(failure)}", fix="raise the limit of threads, or retry later"
        )

    def _threads(self) -> Executor:
        from concurrent.futures import ThreadPoolExecutor

        with self._lock:
            if self._pool is None:
                count = self._batcher.config.decode_threads
                self._pool = ThreadPoolExecutor(count, "advprop-decoder")
            return self._pool

    def _prepare(
        self,
        request: Request,
        images: Sequence[ImageLike],
        prepare: Callable[[Sequence[ImageLike]], NDArray[Any]],
    ) -> None:
        failure: BaseException | None = None
        for _ in ATTEMPTS:
            try:
                if failure is not None:  # every error must reach the owner of the request
                    self._batcher.fail(request, failure)
                    return
                mark_worker_thread()
                if self._batcher.is_open(request):
                    self._batcher.enqueue(request, prepare(images))
                return
            except BaseException as error:
                failure = error
