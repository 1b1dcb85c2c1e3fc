"""`load`: a model file becomes a session."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from runtime.backends.engine_options import EngineOptions
from runtime.backends.open import open_backend, open_folder
from runtime.backends.open import warm_up as run_first
from runtime.backends.threads import Threads
from runtime.batching.batcher import Batching
from runtime.session import Session

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
) -> Session:
    """Loads a model file.

    Args:
        path: an ONNX file that `advprop-export` wrote, or an engine that `advprop build` made of one, with its sidecar.
            Other ONNX files load too, without `predict`. Or the folder of an export, for the file in it that is best
            here: an engine where one runs, INT8 before FP16 before FP32, else the FP32 ONNX file; `explain` says which
            and why. Name the file where it must be that one.
        backend: `auto`, by the kind of file; `onnxruntime`; `onnxruntime-tensorrt`, TensorRT inside ONNX Runtime, which
            builds its engine at the first run; or `tensorrt`, whichever TensorRT built the engine.
        device: `auto` (a GPU where it can be used), `cpu` or `cuda`. Engines run on a GPU only.
        threads: CPU threads inside one run, or a `Threads`; 0 leaves it to the backend.
        warm_up: batch sizes that are run before `load` returns, so that no request pays for the first run. Of an
            engine, the usual and the largest of each profile are run in any case.
        batching: how `submit`, `arun` and their like make batches; default: `Batching()`.
        engine: how an engine is run.

    Raises:
        ModelFileError: no such file, not a model that this version runs, or an engine that was changed, or is for
            another GPU or another release of TensorRT.
        BackendUnavailable: the backend's library or the device is missing.
        RunFailed: the GPU has not enough memory.
        ConfigError: an argument with an impossible value.
    """
    file = Path(path)
    cpu_threads = threads if isinstance(threads, Threads) else Threads(intra=threads)
    passed_over: tuple[str, ...] = ()
    if file.is_dir():
        opened, file, passed_over = open_folder(file, backend, device, cpu_threads, engine)
    else:
        opened = open_backend(file, backend, device, cpu_threads, engine)
    try:
        run_first(opened, warm_up, file)
    except BaseException:
        opened.close()
        raise
    return Session(opened, file, batching, passed_over)
