"""Open the backend for a model file or for the best file in an export folder.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.backends.base import Backend
from runtime.backends.options import EngineOptions, Threads
from runtime.errors import BackendUnavailable, ConfigError, ModelFileError, first_line

__all__ = ["BACKENDS", "CHECKPOINT_SUFFIXES", "ENGINE_SUFFIXES", "open_backend", "open_folder", "warm_up"]

log = logging.getLogger(__name__)

_ONNX_RUNTIME, _ORT_TENSORRT, _TENSORRT = "onnxruntime", "onnxruntime-tensorrt", "tensorrt"
BACKENDS = ("auto", _ONNX_RUNTIME, _ORT_TENSORRT, _TENSORRT)
"""Values of `backend`. `tensorrt` is the TensorRT library that the engine's sidecar names.
`onnxruntime-tensorrt` is TensorRT inside ONNX Runtime, for ONNX files."""
ENGINE_SUFFIXES = (".engine", ".plan")
"""Suffixes of files that TensorRT runs."""
CHECKPOINT_SUFFIXES = (".pt", ".pth")
"""Suffixes of files that PyTorch runs and that can be exported."""
_FASTEST_FIRST = ("int8", "fp16", "bf16", "fp32")
"""Precisions in the names of an export's files, fastest engine first."""


def open_backend(file: Path, backend: str, device: str, threads: Threads, engine: EngineOptions) -> Backend:
    """Open a model file. Arguments and errors are those of `runtime.load`."""
    _check_options(backend, device)
    if file.suffix in ENGINE_SUFFIXES:
        return _open_engine(file, backend, device, threads, engine)
    if file.suffix in CHECKPOINT_SUFFIXES:
        raise ModelFileError(f"{file} is a checkpoint", fix=f"export it first: advprop-export {file}")
    if backend == _TENSORRT:
        raise ConfigError("TensorRT runs engines, not ONNX files", fix=f"build an engine first: advprop build {file}")
    if engine != EngineOptions():
        log.warning("EngineOptions have no effect on %s, which is not an engine", file)
    from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend(file, device, threads, tensorrt=backend == _ORT_TENSORRT)


def open_folder(
    folder: Path, backend: str, device: str, threads: Threads, engine: EngineOptions
) -> tuple[Backend, Path, tuple[str, ...]]:
    """Open the best file of an export: the fastest engine that runs here, or the FP32 ONNX file.

    Args:
        folder: a folder whose files are named as `advprop-export` names them, e.g.
            `model.fp16.engine`.
        backend: see `runtime.load`.
        device: see `runtime.load`.
        threads: see `runtime.load`.
        engine: see `runtime.load`.

    Returns:
        The backend, its file, and one line for each better file that was skipped and why.

    Raises:
        ModelFileError: no file in the folder can be run; the message lists the reasons.
    """
    _check_options(backend, device)
    files = sorted(folder.iterdir(), key=lambda file: (_rank(file), file.name))
    skipped: list[str] = []
    for file in files:
        if file.suffix not in (*ENGINE_SUFFIXES, ".onnx"):
            continue
        try:
            return open_backend(file, backend, device, threads, engine), file, tuple(skipped)
        except (BackendUnavailable, ConfigError) as error:
            reason = first_line(error)
        except ModelFileError as error:
            reason = first_line(error)
            log.warning("skipped: %s", reason)  # the file may be damaged
        skipped.append(f"skipped {file.name}: {reason}")
    if skipped:
        raise ModelFileError("\n  ".join((f"no file in {folder} can be run:", *skipped)))
    checkpoint = min((file for file in files if file.suffix in CHECKPOINT_SUFFIXES), default=None)
    fix = f"export its checkpoint first: advprop-export {checkpoint}" if checkpoint else "pass a model file"
    raise ModelFileError(f"the folder {folder} has no .onnx file and no .engine file", fix=fix)


def _check_options(backend: str, device: str) -> None:
    if backend not in BACKENDS:
        raise ConfigError(f"backend must be {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}; found {backend!r}")
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda; found {device!r}")


def _rank(file: Path) -> int:
    """Return the position in which a file is tried, lowest first."""
    precision = Path(file.stem).suffix[1:] or "fp32"
    place = _FASTEST_FIRST.index(precision) if precision in _FASTEST_FIRST else len(_FASTEST_FIRST)
    if file.suffix in ENGINE_SUFFIXES:
        return place
    # ONNX Runtime on a CPU computes FP16 and INT8 files in FP32, so FP32 is the fastest. Other
    # names come last.
    return 3 * len(_FASTEST_FIRST) - place if precision in _FASTEST_FIRST else 3 * len(_FASTEST_FIRST) + 1


def _open_engine(file: Path, backend: str, device: str, threads: Threads, engine: EngineOptions) -> Backend:
    if backend in (_ONNX_RUNTIME, _ORT_TENSORRT):
        raise ConfigError(
            f"{file} is a TensorRT engine, which ONNX Runtime cannot run",
            fix="load the ONNX file that it was built from",
        )
    if device == "cpu":
        raise ConfigError(
            f"{file} is a TensorRT engine and runs on a GPU only", fix="load its ONNX file with device='cpu'"
        )
    if threads != Threads():
        log.warning("threads have no effect on %s, which computes on the GPU", file)
    from runtime.backends.tensorrt.backend import TensorRTBackend

    return TensorRTBackend.load(file, engine)


def warm_up(backend: Backend, sizes: Sequence[int], file: Path) -> None:
    """Run one batch of each size.

    Raises:
        ConfigError: a size is below 1, or the image size is unknown.
    """
    if any(size < 1 for size in sizes):
        raise ConfigError(f"warm_up takes batch sizes of at least 1; found {list(sizes)}")
    for size in sizes:
        backend.run(np.zeros((size, *_image_shape(backend, file)), backend.input.dtype))


def _image_shape(backend: Backend, file: Path) -> tuple[int, ...]:
    """Return the input's image shape, with the spec's height and width if they are dynamic."""
    shape = backend.input.shape[1:]
    if -1 not in shape:
        return shape
    if backend.spec is None:
        raise ConfigError(
            f"{file} accepts images of any size and has no spec", fix="warm it up by calling run with your images"
        )
    size = (backend.spec.preprocessing.height, backend.spec.preprocessing.width)
    return (*size, 3) if shape[-1] == 3 else (3, *size)
