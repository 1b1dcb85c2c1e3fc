"""`Batcher`: joins requests of several threads into batches, within bounds.

A worker takes a batch as soon as it is full, or when the request at the head of the queue has waited for
`max_delay_us`. While a batch runs, the next one collects; so under load batches fill by themselves.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import atexit
import math
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from numpy.typing import NDArray

from runtime.backends.base import Backend
from runtime.batching.core import Core
from runtime.batching.queue import Answers, Request
from runtime.batching.statistics import BatcherStats
from runtime.device.views import DeviceView
from runtime.errors import ConfigError, InputError

__all__ = ["Batcher", "BatcherStats", "Batching"]

_Answer = TypeVar("_Answer")

_CPU_BATCH = 4
_GPU_BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How a batcher makes batches."""

    max_batch: int = 0
    """Images in a batch at most; fewer where the model file takes fewer. 0: 4 on a CPU, where large batches leave the
    caches and are slower for each image, and 32 on a GPU. benchmarks/runtime_overhead.py finds the best."""
    max_delay_us: int = 1000
    """Microseconds that a request waits for others while the model is idle."""
    max_queued_images: int = 256
    """Images that may wait; requests beyond are refused. 256 images of 224 pixels in float32 are 154 MB."""
    decode_threads: int = 2
    """Threads that decode images for `submit_predict` and `apredict`."""

    def __post_init__(self) -> None:
        for name, least in (("max_batch", 0), ("max_delay_us", 0), ("max_queued_images", 1), ("decode_threads", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}; found {getattr(self, name)}")


class Batcher:
    """Runs requests of any number of threads through a backend, in batches. Safe to share by threads.

    - The answer of a request is of its own images, in their order, whole or not at all.
    - A future can be cancelled until its answer is there, and is never `running`.
    - At its deadline a request ends with DeadlineExceeded, even while its batch runs.
    - Requests of different image sizes are not joined.
    - Networks may round differently in batches of different sizes; see docs/serving.md.
    - Callbacks of futures run in the batcher's threads: keep them short.

    Threads start with the first request. A batcher that is dropped without `close` answers what it was given.
    """

    def __init__(self, backend: Backend, config: Batching) -> None:
        """Makes a batcher that runs `backend`, which stays its owner's to close, after the batcher."""
        largest = config.max_batch or (_CPU_BATCH if backend.device == "cpu" else _GPU_BATCH)
        self.config = replace(config, max_batch=min(largest, backend.batch_range[1]))
        """As given, with the largest batch that there will be."""
        self._core = Core(
            backend,
            max_batch=self.config.max_batch,
            max_delay_s=config.max_delay_us * 1e-6,
            max_queued=config.max_queued_images,
        )
        self._backend = backend
        _cores.add(self._core)
        weakref.finalize(self, self._core.stop, drain=True, wait=False).atexit = False

    def submit(
        self, images_NCHW: Any, *, timeout_s: float = math.inf, finish: Callable[[Answers], _Answer]
    ) -> Future[_Answer]:
        """Asks for an answer.

        Args:
            images_NCHW: as `Backend.run` takes them, in the CPU's memory; not to be changed before the answer is there.
            timeout_s: seconds within which the answer must be there.
            finish: makes the answer of the model's outputs, in a thread of the batcher.

        Returns:
            A future of `finish`'s result. Its errors: DeadlineExceeded, RunFailed, SessionClosed.

        Raises:
            InputError: images that the model does not take, or more than may wait.
            QueueFull: no room now.
            SessionClosed: the batcher is closed.
        """
        batch_NCHW = self._backend.accept(images_NCHW)
        if isinstance(batch_NCHW, DeviceView):
            raise InputError("requests are joined in the CPU's memory, and the images are on the GPU: use run")
        request, future = self.reserve(len(batch_NCHW), timeout_s=timeout_s, finish=finish)
        self.enqueue(request, batch_NCHW)
        return future

    def reserve(
        self, count: int, *, timeout_s: float, finish: Callable[[Answers], _Answer]
    ) -> tuple[Request, Future[_Answer]]:
        """Takes room for `count` images that are not made yet; `enqueue` or `fail` must follow. Raises as `submit`."""
        if math.isnan(timeout_s):
            raise ConfigError("timeout_s must be a number of seconds; found nan")
        return self._core.open(count, timeout_s, finish)

    def enqueue(self, request: Request, images_NCHW: NDArray[Any]) -> None:
        """Brings the images of a reserved request, which `Backend.check_form` must have passed."""
        self._core.enqueue(request, images_NCHW)

    def fail(self, request: Request, error: Exception) -> None:
        """Ends a reserved request whose images could not be made."""
        self._core.fail(request, error)

    def is_open(self, request: Request) -> bool:
        """Whether a reserved request still waits for its answer: it is not late, cancelled or failed."""
        return self._core.is_open(request)

    @property
    def stats(self) -> BatcherStats:
        """What was done so far."""
        return self._core.stats()

    def close(self, *, drain: bool = True) -> None:
        """Lets no more requests in, and returns when none is left. Closing twice is fine.

        Args:
            drain: answer those that wait; otherwise they fail with SessionClosed, except what runs already.

        Called by a future's callback, in a thread of the batcher, it does not wait for the rest.
        """
        self._core.stop(drain=drain, wait=True)


_cores: weakref.WeakSet[Core] = weakref.WeakSet()


def _stop_all() -> None:
    """At the interpreter's end no thread may be inside a backend."""
    for core in list(_cores):
        core.stop(drain=False, wait=True)


atexit.register(_stop_all)
