"""The TensorRT backend: engines of TensorRT 10, TensorRT 11 and TensorRT-RTX.

The backend has not run on a GPU yet. It follows the documentation and type stubs of the APIs, and
tests run its logic on a fake GPU.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend
from runtime.backends.options import EngineOptions
from runtime.backends.tensorrt.engine import LoadedEngine
from runtime.backends.tensorrt.slot import Slot
from runtime.backends.tensorrt.validation import ValidatedEngine, validate_engine
from runtime.device.arrays import DeviceArray
from runtime.device.driver import Cuda, DeviceMemory, DeviceTimes, load_bindings
from runtime.device.views import DeviceView

__all__ = ["TensorRTBackend"]


class TensorRTBackend(Backend):
    """An engine on the first visible GPU."""

    device = "cuda"

    def __init__(self, validated: ValidatedEngine, path: Path, cuda: Cuda, options: EngineOptions) -> None:
        """Load a validated engine, allocate all its memory, and run each of its profiles once.

        Args:
            validated: the engine.
            path: its file, for messages.
            cuda: the GPU.
            options: settings of the engine.

        Raises:
            ModelFileError: TensorRT rejects the engine, or it is not an image classifier.
            RunFailed: the GPU is out of memory, or the engine fails on its own profiles.
        """
        info = validated.info
        self.name = info.flavor
        self.spec = info.spec
        self.contexts = options.contexts
        self._cuda = cuda
        self._slots = _SlotPool(())
        expected = 2 if info.spec is not None and info.spec.output_form == "topk" else 1
        with cuda.current():
            self._engine = LoadedEngine(
                validated.flavor,
                validated.plan,
                path,
                outputs=expected,
                cuda_graphs=options.cuda_graphs,
                allow_host_code=options.allow_host_code,
            )
            self.input, self.outputs = self._engine.input, self._engine.outputs
            self.reasons = _reasons(validated, self._engine, options)
            slots: list[Slot] = []
            try:
                for _ in range(options.contexts):
                    slots.append(Slot(cuda, self._engine, options.max_graphs if options.cuda_graphs else 0))
                    self._run_profiles(slots[-1], times=2 if options.cuda_graphs else 1)
            except BaseException:
                for slot in slots:
                    slot.close()
                raise
        self._slots = _SlotPool(slots)

    @classmethod
    def load(cls, path: Path, options: EngineOptions) -> TensorRTBackend:
        """Load the engine at `path`.

        Raises:
            ModelFileError: the engine has no sidecar, was modified, is for another GPU or release,
                or is not an image classifier.
            BackendUnavailable: the library, cuda-bindings, a driver or a GPU is missing.
            RunFailed: the GPU is out of memory.
        """
        validated = validate_engine(path, allow_host_code=options.allow_host_code)
        return cls(validated, path, Cuda(load_bindings()), options)

    @property
    def batch_range(self) -> tuple[int, int]:
        """1 and the largest batch of all profiles. Batches smaller than any profile are padded."""
        return 1, self._engine.profiles.max_images

    @property
    def device_bytes(self) -> int:
        """Bytes of GPU memory for staging, scratch and outputs, without the engine's weights."""
        return self._cuda.allocated_bytes

    def close(self) -> None:
        """Free the engine and its contexts. Outputs on the GPU stay valid."""
        with self._cuda.current():
            for slot in self._slots.take_all():
                slot.close()
            self._engine.close()

    def _run(self, images_NCHW: NDArray[Any] | DeviceView) -> tuple[NDArray[Any], ...]:
        with self._cuda.current(), self._slots.borrow() as slot:
            if isinstance(images_NCHW, DeviceView):
                self._cuda.check_pointer(images_NCHW.pointer)
            return slot.run(images_NCHW)

    def device_times(self, images_NCHW: NDArray[Any]) -> DeviceTimes | None:
        with self._cuda.current(), self._slots.borrow() as slot:
            return slot.run_timed(images_NCHW)

    def _run_on_device(self, images_NCHW: NDArray[Any] | DeviceView) -> tuple[DeviceArray, ...]:
        """Run a batch of any size. The parts of a large batch write into the same outputs."""
        count, largest = len(images_NCHW), self._engine.profiles.max_images
        parts = [images_NCHW[start : start + largest] for start in range(0, count, largest)]
        with self._cuda.current(), self._slots.borrow() as slot:
            if isinstance(images_NCHW, DeviceView):
                self._cuda.check_pointer(images_NCHW.pointer)
            memories = [
                self._cuda.device_memory(
                    count * output.shape[1] * output.dtype.itemsize, f"{output.name} of {count} images"
                )
                for output in self.outputs
            ]
            start = 0
            for part in parts:
                slot.run_into(
                    part,
                    {
                        output.name: memory.pointer + start * output.shape[1] * output.dtype.itemsize
                        for output, memory in zip(self.outputs, memories, strict=True)
                    },
                )
                start += len(part)
        return tuple(
            self._device_array(memory, (count, output.shape[1]), output.dtype)
            for output, memory in zip(self.outputs, memories, strict=True)
        )

    def _device_array(self, memory: DeviceMemory, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        cuda = self._cuda

        def to_host() -> NDArray[Any]:
            values = np.empty(shape, dtype)
            with cuda.current():
                stream = cuda.stream()
                try:
                    cuda.copy_to_host(values, memory.pointer, stream)
                finally:
                    cuda.synchronize(stream)
                    cuda.close_stream(stream)
            return values

        return DeviceArray(pointer=memory.pointer, shape=shape, dtype=dtype, owner=memory, to_host=to_host)

    def _run_profiles(self, slot: Slot, times: int) -> None:
        """Run each profile now: the first run initializes it, and the second captures its graph."""
        for profile in self._engine.profiles.all:
            for shape in dict.fromkeys((profile.optimal, profile.largest)):
                for _ in range(times):
                    slot.run(np.zeros(shape, self.input.dtype))


class _SlotPool:
    """Lends each slot to one thread at a time, most recently used first: its data is cached."""

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._free = list(slots)
        self._count = len(self._free)
        self._changed = threading.Condition()

    @contextmanager
    def borrow(self) -> Iterator[Slot]:
        """Yield a free slot; wait for one if all are in use."""
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            slot = self._free.pop()
        try:
            yield slot
        finally:
            with self._changed:
                self._free.append(slot)
                self._changed.notify()

    def take_all(self) -> list[Slot]:
        """Wait until no slot is in use, empty the pool for good, and return its slots."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._free) == self._count)
            slots, self._free, self._count = self._free, [], 0
            return slots


def _reasons(validated: ValidatedEngine, engine: LoadedEngine, options: EngineOptions) -> tuple[str, ...]:
    info, flavor = validated.info, validated.flavor
    shares = ", ".join(f"{share:.0%} {name}" for name, share in info.precision_shares.items())
    if not options.cuda_graphs:
        graphs = "off"
    elif engine.is_rtx:
        graphs = "managed by TensorRT-RTX"
    else:
        graphs = f"for up to {options.max_graphs} shapes per context, from the second run of a shape"
    largest = max(math.prod(profile.largest) for profile in engine.profiles.all) * engine.input.dtype.itemsize
    return (
        f"backend: {flavor.name} {flavor.version}, which built the engine",
        f"device: cuda, on {validated.gpu.name}, which the engine was built for",
        f"precision: {info.precision} ({shares})",
        f"batches: {' or '.join(str(profile) for profile in engine.profiles.all)}; larger ones are split",
        f"contexts: {options.contexts}, with about {largest + engine.scratch_bytes:,} bytes of GPU memory each",
        f"CUDA graphs: {graphs}",
    )
