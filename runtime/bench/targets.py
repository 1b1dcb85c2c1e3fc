"""`BenchTarget`: a model to measure, run by a session, ONNX Runtime itself, or PyTorch.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend
from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from runtime.backends.options import Threads
from runtime.bench.rounds import Probe, timed
from runtime.device.arrays import DeviceArray
from runtime.device.driver import Cuda, load_bindings
from runtime.errors import InputError
from runtime.graph.read import sha256_onnx
from runtime.prediction import predictions_of
from runtime.preprocessing import Preprocessor, normalize
from runtime.session import Session
from runtime.spec import ModelSpec
from runtime.system.decode import decode

__all__ = [
    "EVENTS",
    "HOST",
    "HOST_ON_GPU",
    "BenchTarget",
    "TorchOpener",
    "TorchPeer",
    "Work",
    "bare_onnxruntime",
    "on_gpu",
    "session_target",
    "torch_target",
]

EVENTS = "CUDA events"
HOST = "the host's clock"
HOST_ON_GPU = "the host's clock, input and outputs on the GPU, launch and waiting included"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A target with a prepared input."""

    run: Callable[[], object]
    """Runs the target once, from host tensors to host logits. Thread-safe."""
    probes: Mapping[str, Probe]
    """Measurements in addition to `run` if there is one caller. Probes with the same name take
    turns in a round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchTarget:
    """A model to measure."""

    name: str
    facts: Mapping[str, Any]
    """Facts that a result records, such as `kind`, `sha256`, `backend`, `device` and `clock`; plain
    values."""
    most_images: int | None = None
    """Maximum batch size that it runs without splitting."""
    fixed_batch: int | None = None
    """The only batch size that it runs without padding."""
    prepare: Callable[[NDArray[np.uint8], Sequence[bytes]], Work]
    """Prepares the input from pixels, (N, H, W, 3), and from N encoded images."""
    image_size: tuple[int, int]
    """Height and width of the pixels."""
    close: Callable[[], None] = field(default=lambda: None)


def session_target(name: str, session: Session, facts: Mapping[str, Any], image_size: tuple[int, int]) -> BenchTarget:
    """Create a target from a loaded model file."""
    backend = session.backend
    fewest, most = backend.batch_range
    clock = EVENTS if backend.name.startswith("tensorrt") else HOST_ON_GPU if backend.device == "cuda" else HOST

    def prepare(pixels_NHWC: NDArray[np.uint8], encoded: Sequence[bytes]) -> Work:
        batch = _backend_input(backend, pixels_NHWC)
        backend.check(batch)
        probes = {"compute": _compute_probe(backend, batch)}
        if backend.spec is not None:
            probes["predict"] = timed("predict", lambda: session.predict(encoded, batch_size=len(encoded)))
            probes["parts"] = _parts_probe(backend, encoded)
        return Work(run=lambda: session.run(batch), probes=probes)

    return BenchTarget(
        name=name,
        facts={**facts, "backend": backend.name, "device": backend.device, "clock": clock},
        most_images=most,
        fixed_batch=fewest if fewest == most else None,
        prepare=prepare,
        image_size=image_size,
        close=session.close,
    )


def bare_onnxruntime(
    name: str, path: Path, backend: OnnxRuntimeBackend, threads: Threads, image_size: tuple[int, int]
) -> BenchTarget:
    """Create a target that calls `InferenceSession.run`, which shows the overhead of a session.

    Args:
        name: name of the target.
        path: the ONNX file.
        backend: the backend that runs the file. Its own `InferenceSession` is called, so settings
            and arithmetic are the same.
        threads: threads of the backend.
        image_size: height and width.
    """
    session, outputs = backend.session, [output.name for output in backend.outputs]

    def prepare(pixels_NHWC: NDArray[np.uint8], encoded: Sequence[bytes]) -> Work:
        feed = {backend.input.name: _backend_input(backend, pixels_NHWC)}

        def run() -> Any:
            return session.run(outputs, feed)

        # Without a GPU, the call consists of the network only.
        return Work(run=run, probes={} if backend.device == "cuda" else {"compute": timed("compute", run)})

    facts = {
        "kind": "onnx",
        "sha256": sha256_onnx(path),
        "peer": "a bare InferenceSession.run of the same file",
        "backend": "onnxruntime",
        "device": backend.device,
        "clock": HOST,
        "threads": threads.intra,
        "spin": threads.spin,
    }
    fewest, most = backend.batch_range
    return BenchTarget(
        name=name,
        facts=facts,
        most_images=most,
        fixed_batch=fewest if fewest == most else None,
        prepare=prepare,
        image_size=image_size,
    )


class TorchPeer(Protocol):
    """A network in PyTorch to measure."""

    facts: dict[str, Any]
    image_size: tuple[int, int]

    def run(self, images_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits of images, both in host memory. Thread-safe."""

    def probe(self, images_NCHW: NDArray[np.float32]) -> Callable[[], float]:
        """Copy images to the device; return a function that times the network, in milliseconds."""


class TorchOpener(Protocol):
    """Opens networks in PyTorch, such as `advprop.checkpoints.open_torch_peer`."""

    def __call__(
        self, spec: ModelSpec | None, *, checkpoint: Path | None, half: bool, device: str, threads: int
    ) -> tuple[ModelSpec, Sequence[tuple[str, TorchPeer]]]:
        """Open a network, and on a GPU also a compiled copy.

        Args:
            spec: architecture, classes and image size of a network with random weights; None to use
                those of the checkpoint.
            checkpoint: an advprop checkpoint.
            half: compute in FP16 on a GPU.
            device: `auto`, `cpu` or `cuda`.
            threads: CPU threads; 0 leaves the number to PyTorch.

        Returns:
            The spec, and (suffix of the name, network) pairs.
        """


def torch_target(name: str, peer: TorchPeer, spec: ModelSpec) -> BenchTarget:
    """Create a target from a network in PyTorch."""

    def prepare(pixels_NHWC: NDArray[np.uint8], encoded: Sequence[bytes]) -> Work:
        batch = normalize(pixels_NHWC, spec.preprocessing)
        measure = peer.probe(batch)
        return Work(run=lambda: peer.run(batch), probes={"compute": lambda: {"compute": measure()}})

    return BenchTarget(name=name, facts=peer.facts, prepare=prepare, image_size=peer.image_size)


def _backend_input(backend: Backend, pixels_NHWC: NDArray[np.uint8]) -> NDArray[Any]:
    """Convert pixels to a backend's input; without a spec, float inputs range from -1 to 1.

    Raises:
        InputError: the input is not an image with three channels.
    """
    spec, expected = backend.spec, backend.input
    if spec is not None:
        made: NDArray[Any] = Preprocessor.of(spec).convert(pixels_NHWC)
        return made.astype(expected.dtype, copy=False)
    channels_last = expected.shape[-1] == 3
    if not channels_last and expected.shape[1] not in (3, -1):
        raise InputError(f"expected a model whose input is an image with three channels; found {expected}")
    batch = pixels_NHWC if channels_last else np.ascontiguousarray(pixels_NHWC.transpose(0, 3, 1, 2))
    return batch if expected.dtype == np.uint8 else (batch / 127.5 - 1).astype(expected.dtype)


def _compute_probe(backend: Backend, batch: NDArray[Any]) -> Probe:
    """Return a probe of the network alone, with CUDA events if the backend supports them."""
    if backend.device == "cpu":
        return timed("compute", lambda: backend.run_checked(batch))
    if backend.device_times(batch) is None:
        resident = on_gpu(batch, Cuda(load_bindings()))
        return timed("compute", lambda: backend.run_on_device(resident))

    def probe() -> dict[str, float]:
        times = backend.device_times(batch)
        assert times is not None
        return {
            "compute": times.compute_ms,
            "h2d": times.h2d_ms,
            "d2h": times.d2h_ms,
            "enqueue": times.enqueue_ms,
            "latency": times.latency_ms,
        }

    return probe


def on_gpu(batch: NDArray[Any], cuda: Cuda) -> DeviceArray:
    """Copy a batch to the GPU, in the primary context like the backend.

    Raises:
        RunFailed: not enough GPU memory is free.
    """
    with cuda.current():
        memory = cuda.device_memory(batch.nbytes, "a batch")
        stream = cuda.stream()
        try:
            cuda.copy_to_device(memory.pointer, batch, stream)
            cuda.synchronize(stream)
        finally:
            cuda.close_stream(stream)
    return DeviceArray(
        pointer=memory.pointer, shape=batch.shape, dtype=batch.dtype, owner=memory, to_host=lambda: batch
    )


def _parts_probe(backend: Backend, encoded: Sequence[bytes]) -> Probe:
    """Return a probe that measures the steps of `predict`."""
    spec = backend.spec
    assert spec is not None
    preprocessor = Preprocessor.of(spec)

    def probe() -> dict[str, float]:
        marks = [time.perf_counter_ns()]
        images = [decode(image) for image in encoded]
        marks.append(time.perf_counter_ns())
        batch = preprocessor(images).astype(backend.input.dtype, copy=False)
        marks.append(time.perf_counter_ns())
        predictions_of(backend.run_checked(batch), spec)
        marks.append(time.perf_counter_ns())
        spans = [(after - before) / 1e6 for before, after in itertools.pairwise(marks)]
        return dict(zip(("decode", "transform", "run"), spans, strict=True))

    return probe
