"""`Session`: a model file, ready to answer. The object that services embed.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend
from runtime.backends.choose import open_backend
from runtime.backends.choose import warm_up as run_first
from runtime.backends.threads import Threads
from runtime.batcher import Batcher, BatcherStats, Batching
from runtime.decoder import Decoder
from runtime.errors import ConfigError, InputError, SessionClosed, SpecError
from runtime.gate import Gate, in_own_thread
from runtime.images import ImageLike, fit_all, network_input
from runtime.predictions import Prediction, predictions_of, softmax
from runtime.spec import ModelSpec

__all__ = ["Prediction", "Session", "SessionStats", "load", "softmax"]


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
    batcher: BatcherStats
    """The same of `submit`, `submit_predict`, `arun` and `apredict`."""


class Session:
    """A loaded classifier. `load` makes one; usable as a context manager.

    Safe to share by threads: `run` and `predict` run in the thread that calls; `submit`, `arun` and their like
    join the requests of all threads and tasks into batches. `close` lets calls that are inside finish, and later
    ones get SessionClosed. A process forked after `load` gets an InputError: load the model in the child.
    """

    def __init__(self, backend: Backend, source: Path, batching: Batching | None = None) -> None:
        """Wraps a loaded `backend`; `source` is the file it came from, for messages."""
        self._source = source
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
    def stats(self) -> SessionStats:
        """What was done so far."""
        gate = self._gate
        return SessionStats(
            calls=gate.calls, images=gate.images, failed=gate.failed, running=gate.inside, batcher=self._batcher.stats
        )

    def explain(self) -> str:
        """Returns why this backend, device and kernels were chosen, a line each."""
        return "\n".join((f"{self._backend.name} on {self._backend.device}: {self._source}", *self._backend.reasons))

    def run(self, images_NCHW: NDArray[Any]) -> NDArray[Any]:
        """Runs the network on a preprocessed batch.

        Args:
            images_NCHW: normalised float32, (N, 3, H, W), or pixels; `spec.input_form` says which. Of a file whose
                batch size is fixed, any N too: it is split and padded.

        Returns:
            logits or probabilities, as `spec.output_form` says, (N, K); of a `topk` file the largest
            probabilities, whose classes `run_outputs` gives too.

        Raises:
            InputError: wrong dtype, shape or layout, an empty batch, NaN, or a closed session.
            RunFailed: the backend failed.
        """
        return self._run(images_NCHW)[0]

    def run_outputs(self, images_NCHW: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Does what `run` does, and returns every output of the file by its name."""
        answers = self._run(images_NCHW)
        return {output.name: answer for output, answer in zip(self._backend.outputs, answers, strict=True)}

    def predict(self, images: Sequence[ImageLike], *, batch_size: int = 32) -> list[Prediction]:
        """Classifies images of any size; the model file says how to preprocess them.

        Args:
            images: paths, encoded bytes, uint8 arrays (H, W, 3) in RGB or (H, W) in grey,
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

    def submit(self, images_NCHW: NDArray[Any], *, timeout_s: float = math.inf) -> Future[NDArray[Any]]:
        """Does what `run` does, in a batch with other requests; returns at once.

        Args:
            images_NCHW: as `run` takes them; not to be changed before the answer is there.
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

    async def arun(self, images_NCHW: NDArray[Any], *, timeout_s: float = math.inf) -> NDArray[Any]:
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

    def _run(self, images_NCHW: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        self._gate.enter()
        failed = True
        try:
            answers = self._backend.run(images_NCHW)
            failed = False
        finally:
            self._gate.leave(0 if failed else len(images_NCHW), failed=failed)
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


def load(
    path: str | PathLike[str],
    *,
    backend: str = "auto",
    device: str = "auto",
    threads: int | Threads = 0,
    warm_up: Sequence[int] = (),
    batching: Batching | None = None,
) -> Session:
    """Loads a model file.

    Args:
        path: an ONNX file that `advprop-export` wrote. Others load too, without `predict`.
        backend: `auto` or `onnxruntime`.
        device: `auto` (a GPU where it can be used), `cpu` or `cuda`.
        threads: CPU threads inside one run, or a `Threads`; 0 leaves it to the backend.
        warm_up: batch sizes that are run before `load` returns, so that no request pays for the first run.
        batching: how `submit`, `arun` and their like make batches; default: `Batching()`.

    Raises:
        ModelFileError: no such file, or not a model that this version runs.
        BackendUnavailable: the backend's library or the device is missing.
        ConfigError: an argument with an impossible value.
    """
    file = Path(path)
    opened = open_backend(file, backend, device, threads if isinstance(threads, Threads) else Threads(intra=threads))
    try:
        run_first(opened, warm_up, file)
    except BaseException:
        opened.close()
        raise
    return Session(opened, file, batching)
