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
from runtime.errors import SessionClosed
from runtime.system.calls import mark_worker_thread
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

    def start(
        self,
        request: Request,
        images: Sequence[ImageLike],
        prepare: Callable[[Sequence[ImageLike]], NDArray[Any]],
    ) -> None:
        """Call `prepare` for the images of a request in a thread. An error ends the request."""
        try:
            self._threads().submit(self._prepare, request, images, prepare)
        except RuntimeError:  # the session or the interpreter shuts down
            self._batcher.fail(request, SessionClosed("the session was closed before this request ran"))

    def close(self) -> None:
        """Wait until all started requests are prepared. No request may be started afterwards."""
        with self._lock:
            pool = self._pool
        if pool is not None:
            pool.shutdown()

    def _threads(self) -> Executor:
        from concurrent.futures import ThreadPoolExecutor

        with self._lock:
            if self._pool is None:
                count = self._batcher.config.decode_threads
                self._pool = ThreadPoolExecutor(count, "advprop-decoder", initializer=mark_worker_thread)
            return self._pool

    def _prepare(
        self,
        request: Request,
        images: Sequence[ImageLike],
        prepare: Callable[[Sequence[ImageLike]], NDArray[Any]],
    ) -> None:
        if not self._batcher.is_open(request):  # the request has ended already
            return
        try:
            batch_NCHW = prepare(images)
        except Exception as error:  # every error must reach the owner of the request
            self._batcher.fail(request, error)
        else:
            self._batcher.enqueue(request, batch_NCHW)
