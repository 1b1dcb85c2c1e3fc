"""TensorRT 10, TensorRT 11 and TensorRT-RTX: engines, by the calls that all have in common.

Not executed so far, for want of a GPU: written against the APIs' own text and types, and its logic run in tests on a
stand-in for the GPU.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend
from runtime.backends.engine_options import EngineOptions
from runtime.backends.tensorrt.engine import Engine
from runtime.backends.tensorrt.pool import Pool
from runtime.backends.tensorrt.slot import Slot
from runtime.backends.tensorrt.validation import Admitted, admit
from runtime.device.arrays import DeviceArray
from runtime.device.driver import Cuda, DeviceMemory, load_bindings
from runtime.device.times import DeviceTimes
from runtime.device.views import DeviceView

__all__ = ["TensorRTBackend"]


class TensorRTBackend(Backend):
    """An engine on the first visible GPU."""

    device = "cuda"

    def __init__(self, admitted: Admitted, path: Path, cuda: Cuda, options: EngineOptions) -> None:
        """Loads an engine that was admitted, and makes it ready: all memory is there, all its profiles have run.

        Args:
            admitted: the engine.
            path: its file, for messages.
            cuda: the GPU.
            options: how it is run.

        Raises:
            ModelFileError: TensorRT refuses it, or it is not an image classifier.
            RunFailed: the GPU has not enough memory, or the engine fails on its own profiles.
        """
        info = admitted.info
        self.name = info.flavor
        self.spec = info.spec
        self.contexts = options.contexts
        self._cuda = cuda
        self._pool: Pool[Slot] = Pool(())
        expected = 2 if info.spec is not None and info.spec.output_form == "topk" else 1
        with cuda.current():
            self._engine = Engine(
                admitted.flavor,
                admitted.plan,
                path,
                outputs=expected,
                cuda_graphs=options.cuda_graphs,
                allow_host_code=options.allow_host_code,
            )
            self.input, self.outputs = self._engine.input, self._engine.outputs
            self.reasons = _reasons(admitted, self._engine, options)
            slots: list[Slot] = []
            try:
                for _ in range(options.contexts):
                    slots.append(Slot(cuda, self._engine, options.most_graphs if options.cuda_graphs else 0))
                    self._run_profiles(slots[-1], times=2 if options.cuda_graphs else 1)
            except BaseException:
                for slot in slots:
                    slot.close()
                raise
        self._pool = Pool(slots)

    @classmethod
    def load(cls, path: Path, options: EngineOptions) -> TensorRTBackend:
        """Loads the engine at `path`.

        Raises:
            ModelFileError: no sidecar, changed bytes, another GPU or release, or not an image classifier.
            BackendUnavailable: the library, cuda-bindings, a driver or a GPU is missing.
            RunFailed: the GPU has not enough memory.
        """
        admitted = admit(path, allow_host_code=options.allow_host_code)
        return cls(admitted, path, Cuda(load_bindings()), options)

    @property
    def batch_range(self) -> tuple[int, int]:
        """Up to the largest batch of all profiles; fewer than a profile takes are run with rows to spare."""
        return 1, self._engine.profiles.most_images

    @property
    def device_bytes(self) -> int:
        """GPU memory for staging, scratch and outputs; weights, which TensorRT allocates, are not in it."""
        return self._cuda.allocated_bytes

    def close(self) -> None:
        """Frees the engine and its contexts. Outputs that were left on the GPU stay."""
        with self._cuda.current():
            for slot in self._pool.take_all():
                slot.close()
            self._engine.close()

    def _run(self, images_NCHW: NDArray[Any] | DeviceView) -> tuple[NDArray[Any], ...]:
        with self._cuda.current(), self._pool.lend() as slot:
            if isinstance(images_NCHW, DeviceView):
                self._cuda.check_pointer(images_NCHW.pointer)
            return slot.run(images_NCHW)

    def device_times(self, images_NCHW: NDArray[Any]) -> DeviceTimes | None:
        with self._cuda.current(), self._pool.lend() as slot:
            return slot.run_timed(images_NCHW)

    def _run_on_device(self, images_NCHW: NDArray[Any] | DeviceView) -> tuple[DeviceArray, ...]:
        """Splits a batch that is too large; its parts' answers are written one after the other."""
        count, most = len(images_NCHW), self._engine.profiles.most_images
        parts = [images_NCHW[start : start + most] for start in range(0, count, most)]
        with self._cuda.current(), self._pool.lend() as slot:
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
            self._left(memory, (count, output.shape[1]), output.dtype)
            for output, memory in zip(self.outputs, memories, strict=True)
        )

    def _left(self, memory: DeviceMemory, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        cuda = self._cuda

        def to_host() -> NDArray[Any]:
            answers = np.empty(shape, dtype)
            with cuda.current():
                stream = cuda.stream()
                try:
                    cuda.copy_to_host(answers, memory.pointer, stream)
                finally:
                    cuda.synchronize(stream)
                    cuda.close_stream(stream)
            return answers

        return DeviceArray(pointer=memory.pointer, shape=shape, dtype=dtype, owner=memory, to_host=to_host)

    def _run_profiles(self, slot: Slot, times: int) -> None:
        """What is done at the first run of a profile, and at the second, is done before anybody waits for it."""
        for profile in self._engine.profiles.all:
            for shape in dict.fromkeys((profile.usual, profile.most)):
                for _ in range(times):
                    slot.run(np.zeros(shape, self.input.dtype))


def _reasons(admitted: Admitted, engine: Engine, options: EngineOptions) -> tuple[str, ...]:
    info, flavor = admitted.info, admitted.flavor
    shares = ", ".join(f"{share:.0%} {name}" for name, share in info.precision_shares.items())
    if not options.cuda_graphs:
        graphs = "off"
    elif engine.is_rtx:
        graphs = "TensorRT-RTX's own"
    else:
        graphs = f"of up to {options.most_graphs} shapes a context, from the second run of a shape on"
    largest = max(math.prod(profile.most) for profile in engine.profiles.all) * engine.input.dtype.itemsize
    return (
        f"backend: {flavor.name} {flavor.version}, which built the engine",
        f"device: cuda, on {admitted.gpu.name}, for which the engine is",
        f"precision: {info.precision} ({shares})",
        f"batches: {' or '.join(str(profile) for profile in engine.profiles.all)}; larger ones are split",
        f"contexts: {options.contexts}, with about {largest + engine.scratch_bytes:,} bytes of GPU memory each",
        f"CUDA graphs: {graphs}",
    )
