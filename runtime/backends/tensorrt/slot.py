"""`Slot`, which runs one batch at a time: a stream, buffers, contexts and their CUDA graphs.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.tensorrt.context import ExecutionContext
from runtime.backends.tensorrt.engine import LoadedEngine
from runtime.device.driver import Cuda, DeviceTimes
from runtime.device.views import DeviceView
from runtime.errors import RunFailed

__all__ = ["Slot"]

log = logging.getLogger(__name__)

_Shape = tuple[int, ...]
_ALIGNMENT = 256
"""Required alignment of a tensor's address, in bytes. CUDA's allocations have it."""


@dataclass(slots=True)
class _ShapeGraph:
    """The CUDA graph of a batch shape that occurred twice."""

    context: ExecutionContext | None = None
    """The captured context. It is not used otherwise, because the graph depends on its settings."""
    captured: Any = None
    """The graph; None if the shape cannot be captured."""


class Slot:
    """Runs one batch at a time, in any thread, while the primary context is current.

    All of its contexts share one stream and one scratch memory, because they never run at the same
    time.
    """

    def __init__(self, cuda: Cuda, engine: LoadedEngine, max_graphs: int) -> None:
        """Allocate everything for the engine's largest batch.

        Args:
            cuda: the GPU.
            engine: the engine.
            max_graphs: maximum number of batch shapes to capture; 0 for none.

        Raises:
            RunFailed: there is not enough memory.
        """
        self._cuda = cuda
        self._engine = engine
        self._max_graphs = max_graphs
        self._graphs: dict[_Shape, _ShapeGraph] = {}
        self._seen: set[_Shape] = set()
        self._timers: list[int] = []
        self._timed = False
        self._start_ns = self._enqueued_ns = 0
        largest = max(math.prod(profile.largest) for profile in engine.profiles.all)
        rows = engine.profiles.max_images
        sizes = {engine.input.name: largest * engine.input.dtype.itemsize}
        sizes |= {output.name: rows * output.shape[1] * output.dtype.itemsize for output in engine.outputs}
        what = f"a context for batches of up to {rows} images"
        self._stream = cuda.stream()
        self._event = 0
        try:
            self._event = cuda.event()
            self._device = {name: cuda.device_memory(nbytes, what) for name, nbytes in sizes.items()}
            self._host = {name: cuda.pinned_memory(nbytes, what) for name, nbytes in sizes.items()}
            self._scratch = None if engine.is_rtx else cuda.device_memory(engine.scratch_bytes, what)
            self._main = ExecutionContext(engine, self._stream, self._scratch)
        except BaseException:
            self._close_handles()
            raise

    def run(self, images: NDArray[Any] | DeviceView) -> tuple[NDArray[Any], ...]:
        """Run a batch no larger than the engine's largest, and return its outputs, (N, K) each.

        Raises:
            InputError: the engine does not accept images of this size.
            RunFailed: TensorRT or the GPU failed.
        """
        rows = len(images)
        addresses = {output.name: self._device[output.name].pointer for output in self._engine.outputs}
        staged = [
            self._host[output.name].array((rows, output.shape[1]), output.dtype) for output in self._engine.outputs
        ]
        try:
            self._enqueue(images, addresses)
            for output, values in zip(self._engine.outputs, staged, strict=True):
                self._cuda.copy_to_host(values, addresses[output.name], self._stream)
            self._record_timer(3)
            self._cuda.synchronize(self._stream)
        except BaseException:
            # The slot and the images must stay untouched until the stream is idle.
            self._cuda.synchronize_after_failure(self._stream)
            raise
        return tuple(values.copy() for values in staged)

    def run_timed(self, images: NDArray[Any]) -> DeviceTimes:
        """Run a batch like `run`, and return the time of each part instead of the outputs."""
        while len(self._timers) < 4:
            self._timers.append(self._cuda.timer())
        self._timed = True
        try:
            self.run(images)
        finally:
            self._timed = False
        start, copied, computed, end = self._timers
        return DeviceTimes(
            h2d_ms=self._cuda.elapsed_ms(start, copied),
            compute_ms=self._cuda.elapsed_ms(copied, computed),
            d2h_ms=self._cuda.elapsed_ms(computed, end),
            enqueue_ms=(self._enqueued_ns - self._start_ns) / 1e6,
        )

    def run_into(self, images: NDArray[Any] | DeviceView, addresses: dict[str, int]) -> None:
        """Run a batch like `run`, and write the outputs to GPU memory.

        Args:
            images: the batch.
            addresses: address of each output.
        """
        try:
            used = self._enqueue(images, addresses)
            for output in self._engine.outputs:
                name = output.name
                if used[name] != addresses[name]:
                    nbytes = len(images) * output.shape[1] * output.dtype.itemsize
                    self._cuda.copy_on_device(addresses[name], used[name], nbytes, self._stream)
            self._cuda.synchronize(self._stream)
        except BaseException:
            self._cuda.synchronize_after_failure(self._stream)
            raise

    def close(self) -> None:
        """Free everything except the buffers, which are freed with the slot."""
        for graph in self._graphs.values():
            if graph.captured is not None:
                self._cuda.close_graph(graph.captured)
        self._graphs.clear()
        del self._main
        self._close_handles()

    def _enqueue(self, images: NDArray[Any] | DeviceView, outputs: dict[str, int]) -> dict[str, int]:
        """Enqueue a batch, and return the address of each tensor.

        Outputs go to the addresses `outputs`, unless the batch is padded, which needs more memory
        than there is, or an address is not aligned. Then they go to the slot's own buffers. A graph
        is used only if all addresses are the slot's own.
        """
        shape = tuple(images.shape)
        profile, run_as = self._engine.profiles.choose(shape)
        own = {name: memory.pointer for name, memory in self._device.items()}
        addresses = {**own, self._engine.input.name: self._stage(images, run_as)}
        self._record_timer(1)
        if run_as == shape:
            addresses |= {name: address for name, address in outputs.items() if address % _ALIGNMENT == 0}
        if addresses == own and self._max_graphs and not self._engine.is_rtx:
            self._enqueue_graph(profile, run_as, own)
        else:
            self._main.prepare(profile, run_as, addresses)
            self._main.enqueue()
        self._record_timer(2)
        return addresses

    def _record_timer(self, index: int) -> None:
        """Record a timer of a timed run.

        Args:
            index: 0 before the input copy, 1 after it, 2 after the kernels, 3 after the output
                copy.
        """
        if not self._timed:
            return
        if index == 0:
            self._start_ns = time.perf_counter_ns()
        self._cuda.record(self._timers[index], self._stream)
        self._enqueued_ns = time.perf_counter_ns()

    def _stage(self, images: NDArray[Any] | DeviceView, run_as: _Shape) -> int:
        """Make the images readable on the stream, and return their address."""
        name = self._engine.input.name
        target = self._device[name].pointer
        if isinstance(images, DeviceView):
            images.order_after_writes(self._cuda, self._stream, self._event)
            if len(images) == run_as[0] and images.pointer % _ALIGNMENT == 0:
                return images.pointer
            self._cuda.copy_on_device(target, images.pointer, images.nbytes, self._stream)
        else:
            staged = self._host[name].array(tuple(images.shape), self._engine.input.dtype)
            np.copyto(staged, images)
            self._record_timer(0)  # the copy to pinned memory is host time, not GPU time
            self._cuda.copy_to_device(target, staged, self._stream)
        return target

    def _enqueue_graph(self, profile: int, shape: _Shape, own: dict[str, int]) -> None:
        """Launch the first batch of a shape normally, capture the second, and replay later ones."""
        graph = self._graphs.get(shape)
        if graph is not None and graph.captured is not None:
            self._cuda.launch(graph.captured, self._stream)
        elif graph is None and shape in self._seen and len(self._graphs) < self._max_graphs:
            self._capture(profile, shape, own)
        else:
            self._seen.add(shape)
            self._main.prepare(profile, shape, own)
            self._main.enqueue()

    def _capture(self, profile: int, shape: _Shape, own: dict[str, int]) -> None:
        """Run the batch in a new context, and then capture that context."""
        graph = self._graphs[shape] = _ShapeGraph()
        try:
            context = ExecutionContext(self._engine, self._stream, self._scratch)
            context.prepare(profile, shape, own)
        except RunFailed as error:  # probably out of memory; the main context still works
            log.warning("no CUDA graph for batches of shape %s: %s", shape, error)
            self._main.prepare(profile, shape, own)
            self._main.enqueue()
            return
        # TensorRT requires one run before the capture. This one computes the batch, whose outputs a
        # failed capture must not affect.
        context.enqueue()
        self._cuda.synchronize(self._stream)
        try:
            graph.captured = self._cuda.capture(self._stream, context.enqueue)
            graph.context = context
        except RunFailed as error:
            log.warning("no CUDA graph for batches of shape %s: %s", shape, error)

    def _close_handles(self) -> None:
        for event in (self._event, *self._timers):
            if event:
                self._cuda.close_event(event)
        self._cuda.close_stream(self._stream)
