"""`Cuda`: the few calls of the CUDA driver, through cuda-bindings 12.6 and later, 13 included.

The GPU's primary context is retained, which torch, CuPy and ONNX Runtime use too, and no context is made. It is
current in a thread only between `current`'s beginning and end, so a thread keeps whichever context it had.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BackendUnavailable, InputError, RunFailed, first_line
from runtime.system.calls import check_process

__all__ = ["LEGACY_STREAM", "Cuda", "DeviceMemory", "PinnedMemory", "load_bindings"]

log = logging.getLogger(__name__)

LEGACY_STREAM = 1
"""CU_STREAM_LEGACY: the stream of work for which no stream was named."""

_OUT_OF_MEMORY, _NOT_INITIALIZED = 2, 3
_CONTEXT_IS_LOST = (700, 710, 714, 715, 716, 717, 718, 719)  # illegal address, assert, stack, instruction, … , launch
_CODES_WITHOUT_GPU = (34, 35, 36, 100, 101, 803, 804, 999)  # stub, old driver, …, no device, mismatch, unknown


class DeviceMemory:
    """Memory on the GPU; freed when nothing refers to this object. Freeing waits for the GPU."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.pointer = pointer
        """Address on the GPU."""
        self.nbytes = nbytes
        """Bytes."""


class PinnedMemory:
    """Host memory that the GPU copies from and to by itself; freed when nothing refers to this object."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self._bytes = memoryview((ctypes.c_ubyte * nbytes).from_address(pointer)).cast("B")
        self.nbytes = nbytes
        """Bytes."""

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Returns its beginning as an array, which must not outlive this object."""
        return np.ndarray(shape, dtype, self._bytes)


class Cuda:
    """The first visible GPU. Safe to share by threads.

    Pointers and streams are plain integers. Whatever enqueues work or allocates belongs between `current`'s beginning
    and end.
    """

    def __init__(self, api: Any) -> None:
        """Retains the primary context of the GPU that `api` shows first.

        Args:
            api: the module `cuda.bindings.driver`, as `load_bindings` gives it.

        Raises:
            BackendUnavailable: no driver, or no GPU.
            InputError: CUDA was used before this process was forked.
        """
        self._api = api
        self._process = os.getpid()
        self._here = threading.local()
        self._lock = threading.RLock()  # garbage collection under the lock may free memory, which takes it again
        self._later: list[tuple[str, Any, int]] = []
        self.allocated_bytes = 0
        """GPU memory that `device_memory` gave and that is not freed."""
        try:
            self._call("cuInit", 0)
            self._device = self._call("cuDeviceGet", 0)
            self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        except RuntimeError as error:  # cuda-bindings, where there is no driver library
            raise BackendUnavailable(f"CUDA cannot be used: {first_line(error)}") from error
        weakref.finalize(self, _release_context, api, self._device, self._process).atexit = False

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes the primary context current in this thread, and afterwards the one that was before.

        Raises InputError in a process forked from the one that made this object.
        """
        check_process(self._process, "CUDA")
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    # Memory.

    def free_bytes(self) -> int:
        """Returns how much of the GPU's memory nobody uses."""
        free, _ = self._call("cuMemGetInfo")
        return int(free)

    def device_memory(self, nbytes: int, what: str) -> DeviceMemory:
        """Allocates memory on the GPU; `what` says for what. Raises RunFailed where there is not enough."""
        nbytes = max(nbytes, 1)
        memory = DeviceMemory(int(self._call("cuMemAlloc", nbytes, what=f"{what}, {nbytes:,} bytes")), nbytes)
        with self._lock:
            self.allocated_bytes += nbytes
        weakref.finalize(memory, self._release, "cuMemFree", memory.pointer, nbytes).atexit = False
        return memory

    def pinned_memory(self, nbytes: int, what: str) -> PinnedMemory:
        """Allocates page-locked host memory. Raises RunFailed where there is not enough."""
        nbytes = max(nbytes, 1)
        pointer = int(
            self._call("cuMemHostAlloc", nbytes, self._api.CU_MEMHOSTALLOC_PORTABLE, what=f"{what}, {nbytes:,} bytes")
        )
        memory = PinnedMemory(pointer, nbytes)
        weakref.finalize(memory, self._release, "cuMemFreeHost", pointer, 0).atexit = False
        return memory

    def check_pointer(self, pointer: int) -> None:
        """Raises InputError unless `pointer` is memory of this GPU."""
        attribute = self._api.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        status, *place = self._api.cuPointerGetAttribute(attribute, pointer)
        if int(status) != 0 or int(place[0]) != int(self._device):
            found = "no memory that CUDA knows" if int(status) else f"memory of GPU {int(place[0])}"
            raise InputError(f"the array's address is {found}; expected memory of GPU {int(self._device)}")

    # Streams.

    def stream(self) -> int:
        """Makes a stream that does not wait for the default one; `close_stream` ends it."""
        return int(self._call("cuStreamCreate", self._api.CUstream_flags.CU_STREAM_NON_BLOCKING))

    def close_stream(self, stream: int) -> None:
        """Ends a stream, after the work on it."""
        self._call("cuStreamDestroy", stream)

    def event(self) -> int:
        """Makes an event without a time; `close_event` ends it."""
        return int(self._call("cuEventCreate", self._api.CUevent_flags.CU_EVENT_DISABLE_TIMING))

    def close_event(self, event: int) -> None:
        """Ends an event."""
        self._call("cuEventDestroy", event)

    def timer(self) -> int:
        """Makes an event with a time, for `record` and `elapsed_ms`; `close_event` ends it."""
        return int(self._call("cuEventCreate", self._api.CUevent_flags.CU_EVENT_DEFAULT))

    def record(self, timer: int, stream: int) -> None:
        """Sets a timer to the moment when all that is on `stream` now is done."""
        self._call("cuEventRecord", timer, stream)

    def elapsed_ms(self, first: int, last: int) -> float:
        """Returns the milliseconds between two timers whose moments have come."""
        return float(self._call("cuEventElapsedTime", first, last))

    def wait_for(self, stream: int, other: int, event: int) -> None:
        """Lets what comes next on `stream` wait, on the GPU, for what is on `other` now; `event` is overwritten."""
        self._call("cuEventRecord", event, other)
        self._call("cuStreamWaitEvent", stream, event, 0)

    def synchronize(self, stream: int) -> None:
        """Waits, here, for all that is on `stream`. Raises RunFailed where some of it failed."""
        self._call("cuStreamSynchronize", stream)

    def settle(self, stream: int) -> None:
        """Does what `synchronize` does after a failure: whatever else is wrong is not told."""
        with suppress(RunFailed):
            self._call("cuStreamSynchronize", stream)

    # Copies. All return at once.

    def copy_to_device(self, pointer: int, source: NDArray[Any], stream: int) -> None:
        """Copies a contiguous array to the GPU. It must be pinned memory for the copy to return at once."""
        self._call("cuMemcpyHtoDAsync", pointer, source.ctypes.data, source.nbytes, stream)

    def copy_to_host(self, target: NDArray[Any], pointer: int, stream: int) -> None:
        """Fills a contiguous array from the GPU."""
        self._call("cuMemcpyDtoHAsync", target.ctypes.data, pointer, target.nbytes, stream)

    def copy_on_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copies from one place of the GPU's memory to another."""
        self._call("cuMemcpyDtoDAsync", target, source, nbytes, stream)

    # Graphs.

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Any:
        """Records what `enqueue` puts on `stream` as a graph; none of it is done.

        Returns:
            What `launch` takes; `close_graph` ends it.

        Raises:
            RunFailed: it cannot be recorded. The stream can be used as before.
        """
        mode = self._api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", stream, mode)
        self._here.capturing = True  # freeing memory, which garbage collection may do now, would spoil it
        failed = True
        try:
            enqueue()
            failed = False
        finally:
            status, *graph = self._api.cuStreamEndCapture(stream)
            self._here.capturing = False
            self._release_rest()
            if failed and int(status) == 0:
                self._api.cuGraphDestroy(graph[0])
        self._check(status, "cuStreamEndCapture")
        try:
            return self._call("cuGraphInstantiate", graph[0], 0)
        finally:
            self._api.cuGraphDestroy(graph[0])

    def launch(self, graph: Any, stream: int) -> None:
        """Puts a recorded graph on `stream`."""
        self._call("cuGraphLaunch", graph, stream)

    def close_graph(self, graph: Any) -> None:
        """Ends a graph that does not run."""
        self._call("cuGraphExecDestroy", graph)

    # Freeing, by finalizers: in any thread, at any time.

    def _release(self, name: str, handle: Any, nbytes: int) -> None:
        if os.getpid() != self._process:
            return  # a forked child: the memory is its parent's
        with self._lock:
            self.allocated_bytes -= nbytes
            if getattr(self._here, "capturing", False):
                self._later.append((name, handle, 0))
                return
        try:
            with self.current():
                self._call(name, handle)
        except RunFailed as error:  # the context is lost, and the memory with it
            log.debug("%s: %s", name, error)

    def _release_rest(self) -> None:
        with self._lock:
            rest, self._later = self._later, []
        for name, handle, nbytes in rest:
            self._release(name, handle, nbytes)

    def _call(self, name: str, *arguments: Any, what: str = "") -> Any:
        """Calls a function of the driver; returns its value, a tuple of them, or None."""
        status, *values = getattr(self._api, name)(*arguments)
        self._check(status, name, what)
        return values[0] if len(values) == 1 else tuple(values) or None

    def _check(self, status: Any, name: str, what: str = "") -> None:
        code = int(status)
        if code == 0:
            return
        if code == _OUT_OF_MEMORY:
            known, *memory = self._api.cuMemGetInfo()
            free = f"; {int(memory[0]):,} of {int(memory[1]):,} bytes are free" if int(known) == 0 else ""
            place = "there is no more page-locked" if name == "cuMemHostAlloc" else "the GPU is out of"
            raise RunFailed(
                f"{place} memory: asked for {what or name}{free}. Use smaller batches (an engine's largest is set when "
                "it is built), fewer contexts, or end what else is on the GPU"
            )
        if code == _NOT_INITIALIZED:
            raise InputError(
                "CUDA was used in the process of which this one is a fork, and cannot be used in both. Start processes "
                "by spawn, or fork before CUDA is used"
            )
        if code in _CODES_WITHOUT_GPU and name.startswith(("cuInit", "cuDevice")):
            raise BackendUnavailable(f"CUDA cannot be used: {self._words(status)}")
        lost = ". This process's use of the GPU is lost: start it again" if code in _CONTEXT_IS_LOST else ""
        raise RunFailed(f"{name} failed: {self._words(status)}{lost}")

    def _words(self, status: Any) -> str:
        known, text = self._api.cuGetErrorString(status)
        said = text.decode(errors="replace") if int(known) == 0 and text else "unknown error"
        return f"{said} ({getattr(status, 'name', int(status))})"


def _release_context(api: Any, device: Any, process: int) -> None:
    if os.getpid() == process:
        api.cuDevicePrimaryCtxRelease(device)


def load_bindings() -> Any:
    """Returns the module `cuda.bindings.driver`. Raises BackendUnavailable where it is missing."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendUnavailable(
            f"cuda-bindings cannot be imported ({first_line(error)}); pip install 'cuda-bindings>=12.6'"
        ) from error
