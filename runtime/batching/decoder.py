"""`Decoder`: makes the images of requests in threads of its own.

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
from runtime.preprocessing import ImageLike
from runtime.system.calls import mark_own_thread

__all__ = ["Decoder"]


class Decoder:
    """Brings a batcher's reserved requests their images. The batcher's room bounds what waits here.

    Its threads start when first used.
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
        """Has a thread `prepare` the images of a reserved request, and returns; what goes wrong ends the request."""
        try:
            self._threads().submit(self._bring, request, images, prepare)
        except RuntimeError:  # shut down: the session closes, or the interpreter
            self._batcher.fail(request, SessionClosed("the session was closed before this request had its turn"))

    def close(self) -> None:
        """Waits for what is being prepared. Nothing may be started afterwards."""
        with self._lock:
            pool = self._pool
        if pool is not None:
            pool.shutdown()

    def _threads(self) -> Executor:
        from concurrent.futures import ThreadPoolExecutor

        with self._lock:
            if self._pool is None:
                count = self._batcher.config.decode_threads
                self._pool = ThreadPoolExecutor(count, "advprop-decoder", initializer=mark_own_thread)
            return self._pool

    def _bring(
        self,
        request: Request,
        images: Sequence[ImageLike],
        prepare: Callable[[Sequence[ImageLike]], NDArray[Any]],
    ) -> None:
        if not self._batcher.is_open(request):  # late or cancelled by now
            return
        try:
            batch_NCHW = prepare(images)
        except Exception as error:  # whatever it is, the one who waits must be told
            self._batcher.fail(request, error)
        else:
            self._batcher.enqueue(request, batch_NCHW)
