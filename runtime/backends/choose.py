"""`open_backend`: the backend for a model file.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.backends.base import Backend
from runtime.backends.threads import Threads
from runtime.errors import ConfigError, ModelFileError

__all__ = ["open_backend", "warm_up"]


def open_backend(file: Path, backend: str, device: str, threads: Threads) -> Backend:
    """Opens a model file; arguments and errors are those of `runtime.load`."""
    if backend not in ("auto", "onnxruntime"):
        raise ConfigError(f"backend must be auto or onnxruntime; found {backend!r}")
    if file.suffix in (".engine", ".plan"):
        raise ModelFileError(
            f"{file} is a TensorRT engine: this version builds engines but does not run them. Load the "
            "ONNX file beside it here, or give the engine to TensorRT itself (it is a plain plan)"
        )
    from runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(file, device, threads)


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
