"""`open_backend`: the backend for a model file.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.backends.base import Backend
from runtime.backends.threads import Threads
from runtime.errors import ConfigError
from runtime.execution.options import EngineOptions

__all__ = ["BACKENDS", "ENGINE_SUFFIXES", "open_backend", "warm_up"]

log = logging.getLogger(__name__)

BACKENDS = ("auto", "onnxruntime", "tensorrt")
"""What `backend` takes. `tensorrt` is whichever TensorRT built the engine: its sidecar says which."""
ENGINE_SUFFIXES = (".engine", ".plan")
"""Files that TensorRT runs."""


def open_backend(file: Path, backend: str, device: str, threads: Threads, engine: EngineOptions) -> Backend:
    """Opens a model file; arguments and errors are those of `runtime.load`."""
    if backend not in BACKENDS:
        raise ConfigError(f"backend must be {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}; found {backend!r}")
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda; found {device!r}")
    if file.suffix in ENGINE_SUFFIXES:
        return _open_engine(file, backend, device, threads, engine)
    if backend == "tensorrt":
        raise ConfigError(f"TensorRT runs engines; make one of {file} first: advprop build {file}")
    if engine != EngineOptions():
        log.warning("EngineOptions have no effect on %s, which is no engine", file)
    from runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(file, device, threads)


def _open_engine(file: Path, backend: str, device: str, threads: Threads, engine: EngineOptions) -> Backend:
    if backend == "onnxruntime":
        raise ConfigError(f"{file} is a TensorRT engine; ONNX Runtime runs the ONNX file that it was built from")
    if device == "cpu":
        raise ConfigError(f"{file} is a TensorRT engine and runs on a GPU only; load its ONNX file for device='cpu'")
    if threads != Threads():
        log.warning("threads have no effect on %s, which computes on the GPU", file)
    from runtime.backends.tensorrt import TensorRTBackend

    return TensorRTBackend.load(file, engine)


def warm_up(backend: Backend, sizes: Sequence[int], file: Path) -> None:
    """Runs a batch of each of `sizes`. Raises ConfigError for one below 1, or where the image size is not known."""
    if any(size < 1 for size in sizes):
        raise ConfigError(f"warm_up takes batch sizes of at least 1; found {list(sizes)}")
    for size in sizes:
        backend.run(np.zeros((size, *_image_shape(backend, file)), backend.input.dtype))


def _image_shape(backend: Backend, file: Path) -> tuple[int, ...]:
    """The input's, with the spec's height and width where the file leaves them open."""
    shape = backend.input.shape[1:]
    if -1 not in shape:
        return shape
    if backend.spec is None:
        raise ConfigError(f"{file} takes images of any size and has no spec: warm it up by a run of your own")
    size = (backend.spec.preprocessing.height, backend.spec.preprocessing.width)
    return (*size, 3) if shape[-1] == 3 else (3, *size)
