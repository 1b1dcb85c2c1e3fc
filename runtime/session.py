"""`Session`: a model file, ready to answer. The object that services embed.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend
from runtime.errors import ConfigError, InputError, ModelFileError, SpecError
from runtime.images import ImageLike, fit_all, network_input
from runtime.spec import ModelSpec

__all__ = ["Prediction", "Session", "load"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one image."""

    label: str
    """Name of the most probable class."""
    probability: float
    """Its probability, in [0, 1]."""
    index: int
    """Its position among the model's classes."""
    probabilities: NDArray[np.float32]
    """All probabilities, (K,), in the order of `Session.spec.classes`; of a `topk` file the
    largest few, the largest first."""
    indices: NDArray[np.int64]
    """The classes that the probabilities belong to: 0 to K − 1 but for a `topk` file."""

    def top(self, count: int) -> list[tuple[int, float]]:
        """Returns the `count` most probable classes, or as many as there are: index and probability."""
        best = (-self.probabilities).argsort(kind="stable")[:count]
        return [(int(self.indices[place]), float(self.probabilities[place])) for place in best]


class Session:
    """A loaded classifier. `load` makes one; usable as a context manager."""

    def __init__(self, backend: Backend, source: Path) -> None:
        """Wraps a loaded `backend`; `source` is the file it came from, for messages."""
        self._backend: Backend | None = backend
        self._source = source

    @property
    def backend(self) -> Backend:
        """The backend. Raises InputError once the session is closed."""
        if self._backend is None:
            raise InputError(f"the session on {self._source} is closed; load it again")
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

    def run(self, images_NCHW: NDArray[Any]) -> NDArray[Any]:
        """Runs the network on a preprocessed batch.

        Args:
            images_NCHW: normalised float32, (N, 3, H, W), or pixels; `spec.input_form` says which.

        Returns:
            logits or probabilities, as `spec.output_form` says, (N, K); of a `topk` file the largest
            probabilities, whose classes `run_outputs` gives too.

        Raises:
            InputError: wrong dtype or shape, an empty batch, or a closed session.
        """
        return self.backend.run(images_NCHW)[0]

    def run_outputs(self, images_NCHW: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Does what `run` does, and returns every output of the file by its name."""
        backend = self.backend
        answers = backend.run(images_NCHW)
        return {output.name: answer for output, answer in zip(backend.outputs, answers, strict=True)}

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
        """
        many = isinstance(images, Sequence) and not isinstance(images, str | bytes)
        if not many and not (isinstance(images, np.ndarray) and images.ndim == 4):
            raise InputError("predict takes a list of images; put the one image in [ ]")
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1; found {batch_size}")
        spec = self.spec
        predictions: list[Prediction] = []
        for start in range(0, len(images), batch_size):
            fitted_NHWC = fit_all(images[start : start + batch_size], spec.preprocessing)
            batch = network_input(fitted_NHWC, spec.preprocessing, spec.input_form)
            answers_NK, *classes = self.backend.run(batch.astype(self.backend.input.dtype, copy=False))
            probabilities_NK = softmax(answers_NK) if spec.output_form == "logits" else answers_NK.astype(np.float32)
            if classes:
                indices_NK = classes[0]
            else:
                _check_classes(probabilities_NK, spec)
                indices_NK = np.broadcast_to(np.arange(len(spec.classes)), probabilities_NK.shape)
            predictions += [_prediction(*rows, spec) for rows in zip(probabilities_NK, indices_NK, strict=True)]
        return predictions

    def close(self) -> None:
        """Frees the model. Closing twice is fine."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._backend is None else f"{self._backend.name} on {self._backend.device}"
        return f"<Session {self._source} ({state})>"


def softmax(logits_NK: NDArray[Any]) -> NDArray[np.float32]:
    """Returns probabilities, (N, K), computed in float64 so that they sum to one."""
    logits_NK = logits_NK.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf − inf: the probabilities are nan, as they should be
        odds_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
    probabilities_NK: NDArray[np.float32] = (odds_NK / odds_NK.sum(axis=1, keepdims=True)).astype(np.float32)
    return probabilities_NK


def _check_classes(probabilities_NK: NDArray[np.float32], spec: ModelSpec) -> None:
    outputs = probabilities_NK.shape[1]
    if outputs != len(spec.classes):
        raise SpecError(f"the model has {outputs} outputs but its spec names {len(spec.classes)} classes")


def _prediction(probabilities_K: NDArray[np.float32], indices_K: NDArray[np.int64], spec: ModelSpec) -> Prediction:
    place = int(probabilities_K.argmax())
    index = int(indices_K[place])
    return Prediction(spec.classes[index], float(probabilities_K[place]), index, probabilities_K, indices_K)


def load(path: str | PathLike[str], *, backend: str = "auto", device: str = "auto", threads: int = 0) -> Session:
    """Loads a model file.

    Args:
        path: an ONNX file that `advprop-export` wrote. Others load too, without `predict`.
        backend: `auto` or `onnxruntime`.
        device: `auto` (a GPU where it can be used), `cpu` or `cuda`.
        threads: CPU threads inside one run; 0 leaves it to the backend.

    Raises:
        ModelFileError: no such file, or not a model that this version runs.
        BackendUnavailable: the backend's library or the device is missing.
    """
    file = Path(path)
    if backend not in ("auto", "onnxruntime"):
        raise ConfigError(f"backend must be auto or onnxruntime; found {backend!r}")
    if file.suffix in (".engine", ".plan"):
        raise ModelFileError(
            f"{file} is a TensorRT engine: this version builds engines but does not run them. Load the "
            "ONNX file beside it here, or give the engine to TensorRT itself (it is a plain plan)"
        )
    from runtime.backends.onnxruntime import OnnxRuntimeBackend

    return Session(OnnxRuntimeBackend(file, device, threads), file)
