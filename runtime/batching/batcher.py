"""`Batcher`, which joins the requests of several threads into batches.

A worker takes a batch as soon as it is full, or when the first request in the queue has waited for
`max_delay_us`. While a batch runs, the next one accumulates, which fills the batches under load.

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
from runtime.batching.core import BatcherCore
from runtime.batching.queue import Outputs, Request
from runtime.batching.statistics import BatcherStats
from runtime.device.views import DeviceView
from runtime.errors import ConfigError, InputError

__all__ = ["Batcher", "BatcherStats", "Batching"]

_Result = TypeVar("_Result")

_CPU_BATCH = 4
_GPU_BATCH = 32
_GPU_DELAY_US = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """Settings for joining requests into batches."""

    max_batch: int = 0
    """Maximum number of images per batch, further limited by the model file. 0: 32 on a GPU, and 4
    on a CPU, where larger batches exceed the caches and take longer per image; 1 if several batches
    run at the same time on the CPU (`Threads.contexts`).
    benchmarks/runtime_overhead.py finds the best size."""
    max_delay_us: int | None = None
    """Maximum time that a request waits for others while the model is idle, in microseconds. None:
    1000 on a GPU, and 0 on a CPU, where larger batches save no time per image."""
    max_queued_images: int = 256
    """Maximum number of waiting images; further requests are rejected. 256 float32 images of 224
    pixels occupy 154 MB."""
    decode_threads: int = 2
    """Threads that decode images for `submit_predict` and `apredict`."""

    def __post_init__(self) -> None:
        for name, smallest in (("max_batch", 0), ("max_delay_us", 0), ("max_queued_images", 1), ("decode_threads", 1)):
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ConfigError(f"{name} must be at least {smallest}; found {value}")


class Batcher:
    """Runs the requests of any number of threads in batches. Thread-safe.

    - A request gets the results of its own images, in their order, or none at all.
    - A future can be canceled until its result is ready, and is never `running`.
    - At its deadline a request ends with DeadlineExceeded, even while its batch runs.
    - Requests with different image sizes are not joined.
    - Networks may round differently in batches of different sizes; see docs/reference/session.md.
    - Callbacks of futures run in the batcher's threads: keep them short.

    Threads start with the first request. A batcher that is garbage-collected without `close`
    completes its requests.
    """

    def __init__(self, backend: Backend, config: Batching) -> None:
        """Create a batcher for `backend`. The caller closes the backend after the batcher."""
        on_cpu = backend.device == "cpu"
        largest = config.max_batch or ((_CPU_BATCH if backend.contexts == 1 else 1) if on_cpu else _GPU_BATCH)
        delay_us = config.max_delay_us
        if delay_us is None:
            delay_us = 0 if on_cpu else _GPU_DELAY_US
        self.config = replace(config, max_batch=min(largest, backend.batch_range[1]), max_delay_us=delay_us)
        """The configuration with the actual largest batch and delay."""
        self._core = BatcherCore(
            backend,
            max_batch=self.config.max_batch,
            max_delay_s=delay_us * 1e-6,
            max_queued=config.max_queued_images,
        )
        self._backend = backend
        _cores.add(self._core)
        weakref.finalize(self, self._core.stop, drain=True, wait=False).atexit = False

    def submit(
        self, images_NCHW: Any, *, timeout_s: float = math.inf, finish: Callable[[Outputs], _Result]
    ) -> Future[_Result]:
        """Submit a request.

        Args:
            images_NCHW: a batch for `Backend.run` in CPU memory. Do not change it before the result
                is ready.
            timeout_s: deadline of the request, in seconds from now.
            finish: converts the model's outputs to the result, in a thread of the batcher.

        Returns:
            A future of `finish`'s result. It may fail with DeadlineExceeded, RunFailed or
            SessionClosed.

        Raises:
            InputError: the model does not accept the images, or there are more than the queue can
                hold.
            ConfigError: `timeout_s` is nan.
            QueueFull: the queue has no room now.
            SessionClosed: the batcher is closed.
        """
        batch_NCHW = self._backend.accept(images_NCHW)
        if isinstance(batch_NCHW, DeviceView):
            raise InputError("the images are on the GPU, but requests are joined in CPU memory", fix="use run")
        request, future = self.reserve(len(batch_NCHW), timeout_s=timeout_s, finish=finish)
        try:
            self.enqueue(request, batch_NCHW)
        except BaseException as error:
            self.fail(request, error)
            raise
        return future

    def reserve(
        self, count: int, *, timeout_s: float, finish: Callable[[Outputs], _Result]
    ) -> tuple[Request, Future[_Result]]:
        """Reserve room for images that are not ready yet. Call `enqueue` or `fail` afterwards.

        Errors are those of `submit`.
        """
        if math.isnan(timeout_s):
            raise ConfigError("timeout_s must be a number of seconds; found nan")
        return self._core.open(count, timeout_s, finish)

    def enqueue(self, request: Request, images_NCHW: NDArray[Any]) -> None:
        """Pass the images of a reserved request, which `Backend.check_form` has accepted."""
        self._core.enqueue(request, images_NCHW)

    def fail(self, request: Request, error: BaseException) -> None:
        """End a reserved request with an error."""
        self._core.fail(request, error)

    def is_open(self, request: Request) -> bool:
        """Return whether a request has not ended: it is not answered, late, cancelled or failed."""
        return self._core.is_open(request)

    @property
    def stats(self) -> BatcherStats:
        """Counts since the batcher was created."""
        return self._core.stats()

    def close(self, *, drain: bool = True) -> None:
        """Reject new requests, and return when all requests have ended. Closing twice is allowed.

        Called in the callback of a future, which runs in a thread of the batcher, it does not wait.

        Args:
            drain: complete the waiting requests. Otherwise they fail with SessionClosed, except
                those in a running batch.
        """
        self._core.stop(drain=drain, wait=True)


_cores: weakref.WeakSet[BatcherCore] = weakref.WeakSet()


def _stop_all() -> None:
    """Stop all batchers: when the interpreter exits, no thread may be inside a backend."""
    for core in list(_cores):
        core.stop(drain=False, wait=True)


atexit.register(_stop_all)
