"""`Session`: a model file, ready to answer. The object that services embed.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
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
from runtime.prediction import Prediction, predictions_of, softmax
from runtime.preprocessing import ImageLike, fit_all, network_input
from runtime.spec import ModelSpec
from runtime.system.calls import Gate, in_own_thread

__all__ = ["Prediction", "Session", "SessionStats", "softmax"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionStats:
    """What a session has done since it was loaded."""

    calls: int
    """Calls of `run`, `run_outputs` and `predict` that were answered."""
    images: int
    """Their images."""
    failed: int
    """Such calls that raised an error, of whatever kind."""
    running: int
    """Such calls that are not finished."""
    device_bytes: int
    """GPU memory that an engine's contexts and the outputs left there hold; of other backends, and of an engine's
    weights, TensorRT's and ONNX Runtime's own affair, 0."""
    batcher: BatcherStats
    """The same of `submit`, `submit_predict`, `arun` and `apredict`."""


_Answer = TypeVar("_Answer", NDArray[Any], DeviceArray)


class Session:
    """A loaded classifier. `load` makes one; usable as a context manager.

    Safe to share by threads: `run` and `predict` run in the thread that calls; `submit`, `arun` and their like
    join the requests of all threads and tasks into batches. `close` lets calls that are inside finish, and later
    ones get SessionClosed. A process forked after `load` gets an InputError: load the model in the child.
    """

    def __init__(
        self, backend: Backend, source: Path, batching: Batching | None = None, passed_over: Sequence[str] = ()
    ) -> None:
        """Wraps a loaded `backend`.

        Args:
            backend: what runs the model.
            source: the file it came from, for messages.
            batching: as of `load`.
            passed_over: why other files were not taken, for `explain`.
        """
        self._source = source
        self._passed_over = tuple(passed_over)
        self._backend = backend
        self._gate = Gate(f"the session on {source}")
        self._batcher = Batcher(backend, batching or Batching())
        self._decoder = Decoder(self._batcher)

    @property
    def backend(self) -> Backend:
        """The backend. Raises SessionClosed once the session is closed."""
        if self._gate.closed:
            raise SessionClosed(f"the session on {self._source} is closed; load it again")
        return self._backend

    @property
    def spec(self) -> ModelSpec:
        """The model's description of itself. Raises SpecError where the file has none."""
        spec = self.backend.spec
        if spec is None:
            raise SpecError(
                f"{self._source} carries no advprop.spec, so its preprocessing and classes are unknown; "
                "export it with advprop-export, or preprocess yourself and use run"
            )
        return spec

    @property
    def batching(self) -> Batching:
        """How `submit`, `arun` and their like make batches, with the largest batch as it is for this model here."""
        return self._batcher.config

    @property
    def stats(self) -> SessionStats:
        """What was done so far."""
        gate = self._gate
        return SessionStats(
            calls=gate.calls,
            images=gate.images,
            failed=gate.failed,
            running=gate.inside,
            device_bytes=self._backend.device_bytes,
            batcher=self._batcher.stats,
        )

    def explain(self) -> str:
        """Returns why this backend, device and kernels were chosen, a line each."""
        chosen = f"{self._backend.name} on {self._backend.device}: {self._source}"
        return "\n".join((chosen, *self._passed_over, *self._backend.reasons))

    def run(self, images_NCHW: Any, *, stream: object = None) -> NDArray[Any]:
        """Runs the network on a preprocessed batch.

        Args:
            images_NCHW: normalized float32, (N, 3, H, W), or pixels; `spec.input_form` says which. Of a file whose
                batch size is fixed, any N too: it is split and padded. A NumPy array, or one of torch, CuPy, pycuda or
                another library that has `__dlpack__` or `__cuda_array_interface__`, read where it lies; one on the
                GPU where the model runs there, and whose values are not looked at.
            stream: of an array on the GPU, the CUDA stream whose work writes it, where the array does not tell:
                pycuda's tell of none but the default one. A stream of these libraries, or its number.

        Returns:
            logits or probabilities, as `spec.output_form` says, (N, K); of a `topk` file the largest
            probabilities, whose classes `run_outputs` gives too.

        Raises:
            InputError: wrong dtype, shape or layout, an empty batch, NaN, or a closed session.
            RunFailed: the backend failed.
        """
        return self._run(self._backend.run, images_NCHW, stream)[0]

    def run_outputs(self, images_NCHW: Any, *, stream: object = None) -> dict[str, NDArray[Any]]:
        """Does what `run` does, and returns every output of the file by its name."""
        answers = self._run(self._backend.run, images_NCHW, stream)
        return {output.name: answer for output, answer in zip(self._backend.outputs, answers, strict=True)}

    def run_on_device(self, images_NCHW: Any, *, stream: object = None) -> dict[str, DeviceArray]:
        """Does what `run_outputs` does, and leaves the outputs on the GPU, for a model that runs there.

        Returns when they are written, so that no stream need wait; `torch.from_dlpack`, `cupy.asarray` and others take
        them without a copy. Raises InputError for a model that runs on the CPU.
        """
        answers = self._run(self._backend.run_on_device, images_NCHW, stream)
        return {output.name: answer for output, answer in zip(self._backend.outputs, answers, strict=True)}

    def predict(self, images: Sequence[ImageLike], *, batch_size: int = 32) -> list[Prediction]:
        """Classifies images of any size; the model file says how to preprocess them.

        Args:
            images: paths, encoded bytes, uint8 arrays (H, W, 3) in RGB or (H, W) in gray,
                or PIL images; kinds may be mixed.
            batch_size: images the network sees at once.

        Returns:
            One Prediction an image, in order; none for no images.

        Raises:
            DataError: an image cannot be decoded; the message names it.
            SpecError: the model file does not describe its preprocessing.
            InputError: not a list, or a closed session.
        """
        _check_list(images)
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1; found {batch_size}")
        spec = self.spec
        predictions: list[Prediction] = []
        self._gate.enter()
        failed = True
        try:
            for start in range(0, len(images), batch_size):
                batch_NCHW = self._prepared(images[start : start + batch_size], spec)
                predictions += predictions_of(self._backend.run_checked(batch_NCHW), spec)
            failed = False
        finally:
            self._gate.leave(len(images), failed=failed)
        return predictions

    def submit(self, images_NCHW: Any, *, timeout_s: float = math.inf) -> Future[NDArray[Any]]:
        """Does what `run` does, in a batch with other requests; returns at once.

        Args:
            images_NCHW: as `run` takes them, in the CPU's memory; not to be changed before the answer is there.
            timeout_s: seconds after which the future fails with DeadlineExceeded.

        Returns:
            A future of what `run` returns. `cancel` works until the answer is there.

        Raises:
            InputError: as `run`, and for more images than may wait.
            QueueFull: no room; ask again later.
        """
        _ = self.backend  # raises once the session is closed
        return self._batcher.submit(images_NCHW, timeout_s=timeout_s, finish=lambda answers: answers[0])

    def submit_predict(self, images: Sequence[ImageLike], *, timeout_s: float = math.inf) -> Future[list[Prediction]]:
        """Does what `predict` does, in a batch with other requests; returns at once.

        Room in the queue is taken before the images are decoded, in threads of the session.

        Args:
            images: as `predict` takes them; at least one.
            timeout_s: seconds after which the future fails with DeadlineExceeded.

        Returns:
            A future of what `predict` returns; an image that cannot be decoded is its DataError.

        Raises:
            InputError: as `submit`; SpecError: as `predict`; QueueFull: no room; ask again later.
        """
        _check_list(images)
        if len(images) == 0:
            raise InputError("no images; expected at least one")
        spec = self.spec
        request, future = self._batcher.reserve(
            len(images), timeout_s=timeout_s, finish=lambda answers: predictions_of(answers, spec)
        )
        self._decoder.start(request, images, lambda some: self._prepared(some, spec))
        return future

    async def arun(self, images_NCHW: Any, *, timeout_s: float = math.inf) -> NDArray[Any]:
        """Awaits what `submit` returns; cancelling the task cancels the request. Blocks no thread meanwhile."""
        import asyncio

        return await asyncio.wrap_future(self.submit(images_NCHW, timeout_s=timeout_s))

    async def apredict(self, images: Sequence[ImageLike], *, timeout_s: float = math.inf) -> list[Prediction]:
        """Awaits what `submit_predict` returns; cancelling the task cancels the request."""
        import asyncio

        return await asyncio.wrap_future(self.submit_predict(images, timeout_s=timeout_s))

    def close(self, *, drain: bool = True) -> None:
        """Frees the model, after the calls that are inside. Closing twice is fine.

        Args:
            drain: answer the submitted requests that wait; otherwise they fail with SessionClosed.

        Called by a future's callback it returns at once, and the model is freed when the rest is done.
        """
        if not self._gate.close():
            return
        if in_own_thread():
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
        state = "closed" if self._gate.closed else f"{self._backend.name} on {self._backend.device}"
        return f"<Session {self._source} ({state})>"

    def _run(self, run: Callable[..., tuple[_Answer, ...]], images_NCHW: Any, stream: object) -> tuple[_Answer, ...]:
        self._gate.enter()
        count, failed = 0, True
        try:
            answers = run(images_NCHW, stream=stream)
            count, failed = len(answers[0]), False
        finally:
            self._gate.leave(count, failed=failed)
        return answers

    def _prepared(self, images: Sequence[ImageLike], spec: ModelSpec) -> NDArray[Any]:
        fitted_NHWC = fit_all(images, spec.preprocessing)
        batch = network_input(fitted_NHWC, spec.preprocessing, spec.input_form)
        batch = batch.astype(self._backend.input.dtype, copy=False)
        self._backend.check_form(batch)
        return batch

    def _free(self, drain: bool) -> None:
        self._batcher.close(drain=drain)
        self._decoder.close()
        self._backend.close()


def _check_list(images: Any) -> None:
    many = isinstance(images, Sequence) and not isinstance(images, str | bytes)
    if not many and not (isinstance(images, np.ndarray) and images.ndim == 4):
        raise InputError("predict takes a list of images; put the one image in [ ]")
