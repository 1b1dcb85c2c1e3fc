"""`Session`, a loaded model file. Services embed this object.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend
from runtime.batching.batcher import Batcher, BatcherStats, Batching
from runtime.batching.decoder import Decoder
from runtime.device.arrays import DeviceArray
from runtime.errors import ConfigError, InputError, SessionClosed, SpecError
from runtime.graph.foreign import convert_command
from runtime.prediction import Prediction, predictions_of, softmax
from runtime.preprocessing import Preprocessor
from runtime.spec import ModelSpec
from runtime.system.calls import CallTracker, in_worker_thread
from runtime.system.decode import MAX_PIXELS, ImageLike

__all__ = ["Prediction", "Session", "SessionStats", "softmax"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionStats:
    """Counts since the session was loaded."""

    calls: int
    """Completed calls of any method: `run`, `run_outputs`, `run_on_device` and `predict`, and
    answered requests of `submit`, `submit_predict`, `arun` and `apredict`."""
    images: int
    """Images of these calls."""
    failed: int
    """Calls that raised an error, and requests that failed, came too late or found the queue full.
    Canceled requests do not count."""
    running: int
    """Calls in flight, and accepted requests that have not ended."""
    device_bytes: int
    """GPU memory of an engine's contexts and of outputs on the GPU, in bytes. It does not include
    the engine's weights, which TensorRT allocates. 0 for other backends."""
    batcher: BatcherStats
    """Details of `submit`, `submit_predict`, `arun` and `apredict`, which the counts above include."""


_Output = TypeVar("_Output", NDArray[Any], DeviceArray)
_Result = TypeVar("_Result")


class Session:
    """A loaded classifier. `load` returns one; usable as a context manager.

    It is thread-safe: `run` and `predict` run in the calling thread; `submit`, `arun` and related
    methods join the requests of all threads and tasks into batches. `close` waits for calls in
    flight, and later calls raise SessionClosed. In a process forked after `load`, calls raise
    InputError: load the model in the child process.
    """

    def __init__(
        self,
        backend: Backend,
        source: Path,
        batching: Batching | None = None,
        skipped: Sequence[str] = (),
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        """Wrap a loaded `backend`.

        Args:
            backend: runs the model.
            source: the model file, for messages.
            batching: see `load`.
            skipped: why other files were not loaded, one line each, for `explain`.
            max_pixels: see `load`.
        """
        self._source = source
        self._skipped = tuple(skipped)
        self._max_pixels = max_pixels
        self._backend = backend
        self._calls = CallTracker(f"the session on {source}")
        self._close_failed = False
        self._batcher = Batcher(backend, batching or Batching())
        self._decoder = Decoder(self._batcher)

    @property
    def backend(self) -> Backend:
        """The backend.

        Raises:
            SessionClosed: the session is closed.
        """
        if self._calls.closed:
            raise SessionClosed(f"the session on {self._source} is closed", fix="load it again")
        return self._backend

    @property
    def spec(self) -> ModelSpec:
        """The spec inside the model file.

        Raises:
            SpecError: the file has no spec.
        """
        spec = self.backend.spec
        if spec is None:
            raise SpecError(
                f"{self._source} has no advprop.spec, so its preprocessing and classes are unknown",
                fix=f"describe it with {convert_command(self._source)}, pass spec= to load, or use run with "
                "preprocessed images",
            )
        return spec

    @property
    def batching(self) -> Batching:
        """How `submit`, `arun` and related methods form batches, with the actual largest batch."""
        return self._batcher.config

    @property
    def stats(self) -> SessionStats:
        """Counts since the session was loaded."""
        calls, batcher = self._calls, self._batcher.stats
        return SessionStats(
            calls=calls.completed + batcher.answered,
            images=calls.images + batcher.answered_images,
            failed=calls.failed + batcher.failed + batcher.late + batcher.refused,
            running=calls.in_flight + batcher.pending,
            device_bytes=self._backend.device_bytes,
            batcher=batcher,
        )

    def explain(self) -> str:
        """Return which backend, device and kernels were chosen and why, one line each."""
        chosen = f"{self._backend.name} on {self._backend.device}: {self._source}"
        return "\n".join((chosen, *self._skipped, *self._backend.reasons))

    def run(self, images_NCHW: Any, *, stream: object = None) -> NDArray[Any]:
        """Run the network on a preprocessed batch.

        Args:
            images_NCHW: normalized float32, (N, 3, H, W), or pixels, according to
                `spec.input_form`. If the file has a fixed batch size, the batch is split and padded
                to it. A NumPy array, or an array of torch, CuPy, pycuda or another library with
                `__dlpack__` or `__cuda_array_interface__`, which is read in place. An array on the
                GPU is accepted if the model runs there; its values are not validated.
            stream: CUDA stream whose work writes an array on the GPU, if the array does not report
                it. pycuda's arrays only report the default stream. A stream of one of these
                libraries, or its handle.

        Returns:
            (N, K) logits or probabilities, according to `spec.output_form`. For a `topk` file the
            largest probabilities; `run_outputs` returns their classes too.

        Raises:
            InputError: wrong dtype, shape or layout, an empty batch, NaN or infinity, or a closed
                session.
            RunFailed: the backend failed.
        """
        return self._run(self._backend.run, images_NCHW, stream)[0]

    def run_outputs(self, images_NCHW: Any, *, stream: object = None) -> dict[str, NDArray[Any]]:
        """Run the network like `run`, and return every output by its name."""
        return self._named(self._run(self._backend.run, images_NCHW, stream))

    def run_on_device(self, images_NCHW: Any, *, stream: object = None) -> dict[str, DeviceArray]:
        """Run the network like `run_outputs`, and keep the outputs on the GPU.

        The outputs are completely written, so no stream needs to wait. `torch.from_dlpack`,
        `cupy.asarray` and similar functions use them without a copy.

        Raises:
            InputError: the model runs on the CPU, or as in `run`.
            RunFailed: the backend failed.
        """
        return self._named(self._run(self._backend.run_on_device, images_NCHW, stream))

    def predict(self, images: Sequence[ImageLike], *, batch_size: int = 32) -> list[Prediction]:
        """Classify images of any size, with the preprocessing that the model file describes.

        Args:
            images: paths, encoded bytes, uint8 arrays (RGB of shape (H, W, 3), or gray of shape (H,
                W)) or PIL images, in any combination.
            batch_size: images per run of the network.

        Returns:
            One Prediction per image, in their order.

        Raises:
            DataError: an image cannot be decoded; the message names it.
            SpecError: the model file does not describe its preprocessing.
            InputError: `images` is not a list, or the session is closed.
        """
        _check_list(images)
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1; found {batch_size}")
        spec = self.spec
        predictions: list[Prediction] = []
        with self._calls.track() as call:
            for start in range(0, len(images), batch_size):
                batch_NCHW = self._prepare(images[start : start + batch_size], spec)
                predictions += predictions_of(self._backend.run_checked(batch_NCHW), spec)
            call.images = len(images)
        return predictions

    def submit(self, images_NCHW: Any, *, timeout_s: float = math.inf) -> Future[NDArray[Any]]:
        """Submit a batch for `run`, to be joined with other requests, and return at once.

        Args:
            images_NCHW: a batch for `run`, in CPU memory. Do not change it before the result is
                ready.
            timeout_s: seconds after which the future fails with DeadlineExceeded.

        Returns:
            A future of the result of `run`. It can be canceled until the result is ready.

        Raises:
            InputError: as in `run`, or there are more images than the queue can hold.
            QueueFull: the queue has no room; retry later.
        """
        _ = self.backend  # raises SessionClosed after `close`
        return self._batcher.submit(images_NCHW, timeout_s=timeout_s, finish=lambda outputs: outputs[0])

    def submit_predict(self, images: Sequence[ImageLike], *, timeout_s: float = math.inf) -> Future[list[Prediction]]:
        """Submit images for `predict`, to be joined with other requests, and return at once.

        The request takes its place in the queue before its images are decoded by threads of the
        session.

        Args:
            images: at least one image, as in `predict`.
            timeout_s: seconds after which the future fails with DeadlineExceeded.

        Returns:
            A future of the result of `predict`. It fails with DataError if an image cannot be
            decoded.

        Raises:
            InputError: `images` is not a list or is empty, as in `submit`, or the session is
                closed.
            SpecError: the model file does not describe its preprocessing.
            QueueFull: the queue has no room; retry later.
        """
        spec = self.spec
        return self._submit_images(images, timeout_s, lambda outputs: predictions_of(outputs, spec))

    def submit_outputs(self, images_NCHW: Any, *, timeout_s: float = math.inf) -> Future[dict[str, NDArray[Any]]]:
        """Submit a batch like `submit`, for the result of `run_outputs`: every output by its name."""
        _ = self.backend
        return self._batcher.submit(images_NCHW, timeout_s=timeout_s, finish=self._named)

    def submit_images(
        self, images: Sequence[ImageLike], *, timeout_s: float = math.inf
    ) -> Future[dict[str, NDArray[Any]]]:
        """Submit images like `submit_predict`, for every output of the network by its name."""
        return self._submit_images(images, timeout_s, self._named)

    async def arun(self, images_NCHW: Any, *, timeout_s: float = math.inf) -> NDArray[Any]:
        """Await `submit` without blocking a thread. Canceling the task cancels the request."""
        import asyncio

        return await asyncio.wrap_future(self.submit(images_NCHW, timeout_s=timeout_s))

    async def apredict(self, images: Sequence[ImageLike], *, timeout_s: float = math.inf) -> list[Prediction]:
        """Await `submit_predict` without blocking. Canceling the task cancels the request."""
        import asyncio

        return await asyncio.wrap_future(self.submit_predict(images, timeout_s=timeout_s))

    def close(self, *, drain: bool = True) -> None:
        """Wait for calls in flight, and free the model. Closing twice is allowed.

        Called in the callback of a future, it returns immediately, and the model is freed once all
        requests have ended.

        Args:
            drain: complete the submitted requests. Otherwise they fail with SessionClosed.
        """
        if not self._calls.close() and not self._close_failed:
            return
        self._close_failed = False
        if in_worker_thread():
            threading.Thread(target=self._free, args=(drain,), name="advprop-close").start()
        else:
            self._free(drain)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(drain=kind is None)

    def __repr__(self) -> str:
        state = "closed" if self._calls.closed else f"{self._backend.name} on {self._backend.device}"
        return f"<Session {self._source} ({state})>"

    def _run(self, run: Callable[..., tuple[_Output, ...]], images_NCHW: Any, stream: object) -> tuple[_Output, ...]:
        with self._calls.track() as call:
            outputs = run(images_NCHW, stream=stream)
            call.images = len(outputs[0])
        return outputs

    def _named(self, outputs: tuple[_Output, ...]) -> dict[str, _Output]:
        return {info.name: output for info, output in zip(self._backend.outputs, outputs, strict=True)}

    def _submit_images(
        self, images: Sequence[ImageLike], timeout_s: float, finish: Callable[[tuple[NDArray[Any], ...]], _Result]
    ) -> Future[_Result]:
        _check_list(images)
        if len(images) == 0:
            raise InputError("no images; expected at least one")
        spec = self.spec
        request, future = self._batcher.reserve(len(images), timeout_s=timeout_s, finish=finish)
        self._decoder.start(request, images, lambda some: self._prepare(some, spec))
        return future

    def _prepare(self, images: Sequence[ImageLike], spec: ModelSpec) -> NDArray[Any]:
        batch = Preprocessor.of(spec, self._max_pixels)(images).astype(self._backend.input.dtype, copy=False)
        self._backend.check_form(batch)
        return batch

    def _free(self, drain: bool) -> None:
        self._close_failed = True  # such as by Ctrl-C; a second call then tries again
        with ExitStack() as stack:  # each is closed even if another one raises
            stack.callback(self._backend.close)
            stack.callback(self._decoder.close)
            stack.callback(self._batcher.close, drain=drain)
        self._close_failed = False


def _check_list(images: Any) -> None:
    is_list = isinstance(images, Sequence) and not isinstance(images, str | bytes)
    if not is_list and not (isinstance(images, np.ndarray) and images.ndim == 4):
        raise InputError("predict takes a list of images", fix="put a single image in a list: [image]")
