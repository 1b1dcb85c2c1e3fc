"""`open_backend`: the backend for a model file.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.backends.base import Backend
from runtime.backends.engine_options import EngineOptions
from runtime.backends.threads import Threads
from runtime.errors import BackendUnavailable, ConfigError, ModelFileError, first_line

__all__ = ["BACKENDS", "CHECKPOINT_SUFFIXES", "ENGINE_SUFFIXES", "open_backend", "open_folder", "warm_up"]

log = logging.getLogger(__name__)

BACKENDS = ("auto", "onnxruntime", "onnxruntime-tensorrt", "tensorrt")
"""What `backend` takes. `tensorrt` is whichever TensorRT built the engine: its sidecar says which.
`onnxruntime-tensorrt` is the one inside ONNX Runtime, for ONNX files."""
ENGINE_SUFFIXES = (".engine", ".plan")
"""Files that TensorRT runs."""
CHECKPOINT_SUFFIXES = (".pt", ".pth")
"""Files that PyTorch runs, and that are exported."""
_QUICKEST = ("int8", "fp16", "bf16", "fp32")
"""Engines of an export by the precision in their names, the quickest first."""


def open_backend(file: Path, backend: str, device: str, threads: Threads, engine: EngineOptions) -> Backend:
    """Opens a model file; arguments and errors are those of `runtime.load`."""
    _check(backend, device)
    if file.suffix in ENGINE_SUFFIXES:
        return _open_engine(file, backend, device, threads, engine)
    if file.suffix in CHECKPOINT_SUFFIXES:
        raise ModelFileError(f"{file} is a checkpoint; export it first: advprop-export {file}")
    if backend == "tensorrt":
        raise ConfigError(f"TensorRT runs engines; make one of {file} first: advprop build {file}")
    if engine != EngineOptions():
        log.warning("EngineOptions have no effect on %s, which is no engine", file)
    from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend(file, device, threads, tensorrt=backend == "onnxruntime-tensorrt")


def open_folder(
    folder: Path, backend: str, device: str, threads: Threads, engine: EngineOptions
) -> tuple[Backend, Path, tuple[str, ...]]:
    """Opens the best file of an export's folder that works here: the quickest engine, else the FP32 ONNX file.

    Args:
        folder: with files that are called as `advprop-export` calls them, `model.fp16.engine`.
        backend: and the rest, as of `runtime.load`.

    Returns:
        The backend, its file, and a line for each file that would have been better and why it was passed over.

    Raises:
        ModelFileError: nothing in the folder can be run; the message says what of each.
    """
    _check(backend, device)
    files = sorted(folder.iterdir(), key=lambda file: (_rank(file), file.name))
    passed_over: list[str] = []
    for file in files:
        if file.suffix not in (*ENGINE_SUFFIXES, ".onnx"):
            continue
        try:
            return open_backend(file, backend, device, threads, engine), file, tuple(passed_over)
        except (BackendUnavailable, ConfigError) as error:
            reason = first_line(error)
        except ModelFileError as error:
            reason = first_line(error)
            log.warning("passed over: %s", reason)  # damaged, perhaps: somebody should know
        passed_over.append(f"passed over {file.name}: {reason}")
    if passed_over:
        raise ModelFileError("\n  ".join((f"nothing in the folder {folder} can be run:", *passed_over)))
    checkpoint = min((file for file in files if file.suffix in CHECKPOINT_SUFFIXES), default=None)
    advice = f"export its checkpoint first: advprop-export {checkpoint}" if checkpoint else "give a model file"
    raise ModelFileError(f"the folder {folder} has no .onnx and no .engine file; {advice}")


def _check(backend: str, device: str) -> None:
    if backend not in BACKENDS:
        raise ConfigError(f"backend must be {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}; found {backend!r}")
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda; found {device!r}")


def _rank(file: Path) -> int:
    """How early a file is tried."""
    named = Path(file.stem).suffix[1:] or "fp32"
    place = _QUICKEST.index(named) if named in _QUICKEST else len(_QUICKEST)
    if file.suffix in ENGINE_SUFFIXES:
        return place
    # ONNX Runtime computes FP16 in FP32 on a CPU, and INT8 too; names that say nothing come last.
    return 3 * len(_QUICKEST) - place if named in _QUICKEST else 3 * len(_QUICKEST) + 1


def _open_engine(file: Path, backend: str, device: str, threads: Threads, engine: EngineOptions) -> Backend:
    if backend.startswith("onnxruntime"):
        raise ConfigError(f"{file} is a TensorRT engine; ONNX Runtime runs the ONNX file that it was built from")
    if device == "cpu":
        raise ConfigError(f"{file} is a TensorRT engine and runs on a GPU only; load its ONNX file for device='cpu'")
    if threads != Threads():
        log.warning("threads have no effect on %s, which computes on the GPU", file)
    from runtime.backends.tensorrt.backend import TensorRTBackend

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
