"""`load`, which opens a model file as a session."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np

from runtime.backends.base import Backend
from runtime.backends.open import open_backend, open_folder
from runtime.backends.open import warm_up as run_warm_up
from runtime.backends.options import EngineOptions, Threads
from runtime.batching.batcher import Batching
from runtime.errors import ConfigError, ModelFileError
from runtime.graph.foreign import convert_command
from runtime.session import Session
from runtime.spec import ModelSpec
from runtime.system.decode import MAX_PIXELS
from runtime.system.files import is_url, no_such

__all__ = ["load"]


def load(
    path: str | PathLike[str],
    *,
    backend: str = "auto",
    device: str = "auto",
    threads: int | Threads = 0,
    warm_up: Sequence[int] = (),
    batching: Batching | None = None,
    engine: EngineOptions = EngineOptions(),  # noqa: B008  # frozen
    spec: ModelSpec | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Session:
    """Load a model file.

    Args:
        path: an ONNX file that `advprop-export` wrote, or an engine that `advprop build` built,
            with its sidecar. Other ONNX files load too, but `predict` needs a `spec`, or a file
            that `advprop convert` wrote. A folder written by
            `advprop-export` loads its best file that runs here: INT8 before FP16 before FP32
            engines, then the FP32 ONNX file. `Session.explain` reports which file was chosen and
            why. Pass the file itself to load exactly that one.
        backend: `auto` decides by the type of file. `onnxruntime`, or `onnxruntime-tensorrt`, which
            runs TensorRT inside ONNX Runtime and builds its engine during the first run. `tensorrt`
            uses the TensorRT library that built the engine.
        device: `auto` (a GPU if available), `cpu` or `cuda`. Engines run on a GPU only.
        threads: CPU threads for one run, or a `Threads`; 0 lets the backend decide.
        warm_up: batch sizes to run before `load` returns, which keeps the cost of the first run
            away from requests. An engine always runs the optimal and largest batch of each profile.
        batching: how `submit`, `arun` and related methods form batches (default: `Batching()`).
        engine: settings of an engine; ONNX files ignore them.
        spec: description of a file of another tool, which contains none.
        max_pixels: maximum size of an encoded image, width times height. The size is read from the
            image's header: larger images raise DataError and are not decoded.

    Raises:
        ModelFileError: the file is missing, is not a supported model, was modified, or is an engine
            for another GPU or another TensorRT release.
        BackendUnavailable: the backend's library or the device is missing.
        RunFailed: the GPU is out of memory.
        ConfigError: an argument has an invalid value.
    """
    if max_pixels < 1:
        raise ConfigError(f"max_pixels must be at least 1; found {max_pixels}")
    file = Path(path)
    if is_url(path):
        raise ModelFileError(no_such("model file", path))
    cpu_threads = threads if isinstance(threads, Threads) else Threads(intra=threads)
    skipped: tuple[str, ...] = ()
    if file.is_dir():
        opened, file, skipped = open_folder(file, backend, device, cpu_threads, engine)
    else:
        opened = open_backend(file, backend, device, cpu_threads, engine)
    try:
        if spec is not None:
            _describe(opened, spec, file)
        run_warm_up(opened, warm_up, file)
    except BaseException:
        opened.close()
        raise
    return Session(opened, file, batching, skipped, max_pixels)


def _describe(backend: Backend, spec: ModelSpec, file: Path) -> None:
    """Set the spec of a backend whose file contains none."""
    if backend.spec is not None:
        raise ConfigError(f"{file} contains a spec", fix="load it without spec=")
    dtype, layout = spec.input_form.split()
    height, width = spec.preprocessing.height, spec.preprocessing.width
    image = (height, width, 3) if layout == "NHWC" else (3, height, width)
    fits = backend.input.dtype == np.dtype(dtype) and all(
        size in (-1, expected) for size, expected in zip(backend.input.shape[1:], image, strict=True)
    )
    classes = backend.outputs[0].shape[-1]
    if not fits or classes not in (-1, len(spec.classes)):
        raise ConfigError(
            f"{file} has {backend.input} and {backend.outputs[0]}, but its spec describes {spec.input_form} images of "
            f"{height}×{width} pixels and {len(spec.classes)} classes",
            fix=f"correct the spec, or convert the file: {convert_command(file)}",
        )
    backend.spec = spec
