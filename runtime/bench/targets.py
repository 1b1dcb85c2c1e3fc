"""`Contestant`: whatever takes part, and how each of its quantities is measured.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend
from runtime.bench.rounds import Probe, timed
from runtime.device.arrays import DeviceArray
from runtime.device.driver import Cuda, load_bindings
from runtime.errors import InputError
from runtime.prediction import predictions_of
from runtime.preprocessing import decode, fit_to_input, network_input
from runtime.session import Session

__all__ = [
    "EVENTS",
    "HOST",
    "HOST_ON_GPU",
    "Contestant",
    "TorchPeer",
    "Work",
    "backend_input",
    "of_session",
    "of_torch",
    "on_gpu",
]

EVENTS = "CUDA events"
HOST = "the host's clock"
HOST_ON_GPU = "the host's clock, input and outputs on the GPU, launch and waiting included"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A contestant with a batch in its hands."""

    run: Callable[[], object]
    """Host tensors in, host logits out; safe to call from several threads."""
    probes: Mapping[str, Probe]
    """What is measured beside `run` where there is one caller. Probes of one name take turns in a round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """One of those that take turns."""

    name: str
    facts: Mapping[str, Any]
    """`kind`, `sha256`, `backend`, `device`, `clock`, settings, …; plain values."""
    most_images: int | None = None
    """The largest batch it takes whole."""
    fixed_batch: int | None = None
    """The only batch it takes as it is."""
    prepare: Callable[[NDArray[np.uint8], Sequence[bytes]], Work]
    """Takes pixels (N, H, W, 3) and N encoded images, and returns what is timed."""
    image_size: tuple[int, int]
    """Height and width of the pixels it is given."""
    close: Callable[[], None] = field(default=lambda: None)


class TorchPeer(Protocol):
    """What `advprop.checkpoints.torch_peer` makes: a PyTorch model to be timed."""

    facts: dict[str, Any]
    image_size: tuple[int, int]

    def run(self, images_NCHW: NDArray[np.float32]) -> NDArray[np.float32]: ...

    def probe(self, images_NCHW: NDArray[np.float32]) -> Callable[[], float]:
        """Puts the images where the model is; returns a call that gives the network's milliseconds."""


def of_session(name: str, session: Session, facts: Mapping[str, Any], image_size: tuple[int, int]) -> Contestant:
    """Makes a contestant of a loaded model file."""
    backend = session.backend
    fewest, most = backend.batch_range
    clock = EVENTS if backend.name.startswith("tensorrt") else HOST_ON_GPU if backend.device == "cuda" else HOST

    def prepare(pixels_NHWC: NDArray[np.uint8], encoded: Sequence[bytes]) -> Work:
        batch = backend_input(backend, pixels_NHWC)
        backend.check(batch)
        probes = {"compute": _compute(backend, batch)}
        if backend.spec is not None:
            probes["predict"] = timed("predict", lambda: session.predict(encoded, batch_size=len(encoded)))
            probes["parts"] = _parts(backend, encoded)
        return Work(run=lambda: session.run(batch), probes=probes)

    return Contestant(
        name=name,
        facts={**facts, "backend": backend.name, "device": backend.device, "clock": clock},
        most_images=most,
        fixed_batch=fewest if fewest == most else None,
        prepare=prepare,
        image_size=image_size,
        close=session.close,
    )


def of_torch(name: str, peer: TorchPeer, normalized: Callable[[NDArray[np.uint8]], NDArray[np.float32]]) -> Contestant:
    """Makes a contestant of a PyTorch model; `normalized` makes its input of pixels."""

    def prepare(pixels_NHWC: NDArray[np.uint8], encoded: Sequence[bytes]) -> Work:
        batch = normalized(pixels_NHWC)
        measure = peer.probe(batch)
        return Work(run=lambda: peer.run(batch), probes={"compute": lambda: {"compute": measure()}})

    return Contestant(name=name, facts=peer.facts, prepare=prepare, image_size=peer.image_size)


def backend_input(backend: Backend, pixels_NHWC: NDArray[np.uint8]) -> NDArray[Any]:
    """Makes what a backend takes of pixels; of a file without a spec, pixels scaled to [-1, 1] where it takes floats.

    Raises InputError for a file whose input is none that we know.
    """
    spec, expected = backend.spec, backend.input
    if spec is not None:
        made: NDArray[Any] = network_input(pixels_NHWC, spec.preprocessing, spec.input_form)
        return made.astype(expected.dtype, copy=False)
    last = expected.shape[-1] == 3
    if not last and expected.shape[1] not in (3, -1):
        raise InputError(f"images of three channels are run; the model expects {expected}")
    batch = pixels_NHWC if last else np.ascontiguousarray(pixels_NHWC.transpose(0, 3, 1, 2))
    return batch if expected.dtype == np.uint8 else (batch / 127.5 - 1).astype(expected.dtype)


def _compute(backend: Backend, batch: NDArray[Any]) -> Probe:
    """The network alone: by events where the backend has them, else by the host's clock."""
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
    """Puts a batch on the GPU, once, in the primary context that the backend uses too. Raises RunFailed."""
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


def _parts(backend: Backend, encoded: Sequence[bytes]) -> Probe:
    """What `predict` does, step by step."""
    spec = backend.spec
    assert spec is not None

    def probe() -> dict[str, float]:
        marks = [time.perf_counter_ns()]
        images = [decode(image) for image in encoded]
        marks.append(time.perf_counter_ns())
        fitted = np.stack([fit_to_input(image, spec.preprocessing) for image in images])
        batch = network_input(fitted, spec.preprocessing, spec.input_form).astype(backend.input.dtype, copy=False)
        marks.append(time.perf_counter_ns())
        predictions_of(backend.run_checked(batch), spec)
        marks.append(time.perf_counter_ns())
        spans = [(after - before) / 1e6 for before, after in itertools.pairwise(marks)]
        return dict(zip(("decode", "transform", "run"), spans, strict=True))

    return probe
