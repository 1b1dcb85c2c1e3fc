"""`Slot`: what one batch at a time needs to run: a stream, staging buffers, contexts and their graphs.

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

from runtime.backends.tensorrt.context import Execution
from runtime.backends.tensorrt.engine import Engine
from runtime.device.driver import Cuda
from runtime.device.times import DeviceTimes
from runtime.device.views import DeviceView
from runtime.errors import RunFailed

__all__ = ["Slot"]

log = logging.getLogger(__name__)

_Shape = tuple[int, ...]
_ALIGNMENT = 256
"""Bytes: what TensorRT wants of each tensor's address, and what CUDA's allocations have."""


@dataclass(slots=True)
class _Graph:
    """A shape that came twice."""

    execution: Execution | None = None
    """The context that was captured. It is used for nothing else, so that nothing in it changes."""
    recorded: Any = None
    """None where it cannot be captured."""


class Slot:
    """Runs one batch at a time, in whichever thread has it, while the primary context is current.

    All its contexts share one stream and one scratch memory: nothing of it ever runs at the same time.
    """

    def __init__(self, cuda: Cuda, engine: Engine, most_graphs: int) -> None:
        """Allocates everything for the engine's largest batch.

        Args:
            cuda: the GPU.
            engine: what is run.
            most_graphs: shapes to keep a graph of; 0 for none.

        Raises:
            RunFailed: there is not enough memory.
        """
        self._cuda = cuda
        self._engine = engine
        self._most_graphs = most_graphs
        self._graphs: dict[_Shape, _Graph] = {}
        self._seen: set[_Shape] = set()
        self._timers: list[int] = []
        self._timed = False
        self._began_ns = self._enqueued_ns = 0
        largest = max(math.prod(profile.most) for profile in engine.profiles.all)
        rows = engine.profiles.most_images
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
            self._main = Execution(engine, self._stream, self._scratch)
        except BaseException:
            self._close_handles()
            raise

    def run(self, images: NDArray[Any] | DeviceView) -> tuple[NDArray[Any], ...]:
        """Runs a batch of at most the engine's largest; returns its answers, (N, K) each.

        Raises:
            InputError: images of a size that the engine does not take.
            RunFailed: TensorRT or the GPU failed.
        """
        rows = len(images)
        places = {output.name: self._device[output.name].pointer for output in self._engine.outputs}
        staged = [
            self._host[output.name].array((rows, output.shape[1]), output.dtype) for output in self._engine.outputs
        ]
        try:
            self._enqueue(images, places)
            for output, answers in zip(self._engine.outputs, staged, strict=True):
                self._cuda.copy_to_host(answers, places[output.name], self._stream)
            self._mark(3)
            self._cuda.synchronize(self._stream)
        except BaseException:
            self._cuda.settle(self._stream)  # nobody may use the slot, or free the images, before the stream is idle
            raise
        return tuple(answers.copy() for answers in staged)

    def run_timed(self, images: NDArray[Any]) -> DeviceTimes:
        """Does what `run` does, in the same way, and returns how long each part took instead of the answers."""
        while len(self._timers) < 4:
            self._timers.append(self._cuda.timer())
        self._timed = True
        try:
            self.run(images)
        finally:
            self._timed = False
        start, brought, done, end = self._timers
        return DeviceTimes(
            h2d_ms=self._cuda.elapsed_ms(start, brought),
            compute_ms=self._cuda.elapsed_ms(brought, done),
            d2h_ms=self._cuda.elapsed_ms(done, end),
            enqueue_ms=(self._enqueued_ns - self._began_ns) / 1e6,
        )

    def run_into(self, images: NDArray[Any] | DeviceView, places: dict[str, int]) -> None:
        """Does what `run` does, but leaves the answers on the GPU.

        Args:
            images: the batch.
            places: address of each output.
        """
        try:
            used = self._enqueue(images, places)
            for output in self._engine.outputs:
                name = output.name
                if used[name] != places[name]:
                    nbytes = len(images) * output.shape[1] * output.dtype.itemsize
                    self._cuda.copy_on_device(places[name], used[name], nbytes, self._stream)
            self._cuda.synchronize(self._stream)
        except BaseException:
            self._cuda.settle(self._stream)
            raise

    def close(self) -> None:
        """Frees everything but the buffers, which are freed with the slot."""
        for graph in self._graphs.values():
            if graph.recorded is not None:
                self._cuda.close_graph(graph.recorded)
        self._graphs.clear()
        del self._main
        self._close_handles()

    def _enqueue(self, images: NDArray[Any] | DeviceView, places: dict[str, int]) -> dict[str, int]:
        """Puts a batch on the stream; returns where each tensor is.

        Outputs are in `places`, but for rows to spare, which there is no room for, and addresses that TensorRT does not
        take. A graph is used only where all addresses are the slot's own.
        """
        shape = tuple(images.shape)
        profile, run_as = self._engine.profiles.choose(shape)
        own = {name: memory.pointer for name, memory in self._device.items()}
        addresses = {**own, self._engine.input.name: self._bring(images, run_as)}
        self._mark(1)
        if run_as == shape:
            addresses |= {name: place for name, place in places.items() if place % _ALIGNMENT == 0}
        if addresses == own and self._most_graphs and not self._engine.is_rtx:
            self._replay(profile, run_as, own)
        else:
            self._main.prepare(profile, run_as, addresses)
            self._main.enqueue()
        self._mark(2)
        return addresses

    def _mark(self, place: int) -> None:
        """While a run is timed: the end of one of its parts. The first mark is that of its beginning."""
        if not self._timed:
            return
        if place == 0:
            self._began_ns = time.perf_counter_ns()
        self._cuda.record(self._timers[place], self._stream)
        self._enqueued_ns = time.perf_counter_ns()

    def _bring(self, images: NDArray[Any] | DeviceView, run_as: _Shape) -> int:
        """Makes the images readable on the stream; returns their address. Rows to spare keep what was there."""
        name = self._engine.input.name
        target = self._device[name].pointer
        if isinstance(images, DeviceView):
            images.order(self._cuda, self._stream, self._event)
            if len(images) == run_as[0] and images.pointer % _ALIGNMENT == 0:
                return images.pointer
            self._cuda.copy_on_device(target, images.pointer, images.nbytes, self._stream)
        else:
            staged = self._host[name].array(tuple(images.shape), self._engine.input.dtype)
            np.copyto(staged, images)
            self._mark(0)  # the copy into pinned memory is the host's, not the GPU's
            self._cuda.copy_to_device(target, staged, self._stream)
        return target

    def _replay(self, profile: int, shape: _Shape, own: dict[str, int]) -> None:
        """The first run of a shape is launched as it is; the second one makes its graph; the others replay it."""
        graph = self._graphs.get(shape)
        if graph is not None and graph.recorded is not None:
            self._cuda.launch(graph.recorded, self._stream)
        elif graph is None and shape in self._seen and len(self._graphs) < self._most_graphs:
            self._make_graph(profile, shape, own)
        else:
            self._seen.add(shape)
            self._main.prepare(profile, shape, own)
            self._main.enqueue()

    def _make_graph(self, profile: int, shape: _Shape, own: dict[str, int]) -> None:
        """Runs the batch in a context of its own, then captures that context."""
        graph = self._graphs[shape] = _Graph()
        try:
            execution = Execution(self._engine, self._stream, self._scratch)
            execution.prepare(profile, shape, own)
        except RunFailed as error:  # most likely memory: the slot's first context still works
            log.warning("no CUDA graph for batches of shape %s: %s", shape, error)
            self._main.prepare(profile, shape, own)
            self._main.enqueue()
            return
        execution.enqueue()  # TensorRT wants this once before capture; it gives this batch's answers
        # The batch's own answers must not be lost to a capture that goes wrong.
        self._cuda.synchronize(self._stream)
        try:
            graph.recorded = self._cuda.capture(self._stream, execution.enqueue)
            graph.execution = execution
        except RunFailed as error:
            log.warning("batches of shape %s run without a CUDA graph: %s", shape, error)

    def _close_handles(self) -> None:
        for event in (self._event, *self._timers):
            if event:
                self._cuda.close_event(event)
        self._cuda.close_stream(self._stream)
