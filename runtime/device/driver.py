"""`Cuda`: the CUDA driver calls that the runtime needs, through cuda-bindings 12.6 or later.

It uses the GPU's primary context, like torch, CuPy and ONNX Runtime, and creates no context of its
own. The context is current only inside `Cuda.current`, which restores the thread's previous
context.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BackendUnavailable, InputError, RunFailed, first_line
from runtime.system.calls import check_not_forked

__all__ = ["LEGACY_STREAM", "Cuda", "DeviceMemory", "DeviceTimes", "PinnedMemory", "load_bindings"]

log = logging.getLogger(__name__)

LEGACY_STREAM = 1
"""CU_STREAM_LEGACY, the stream of work without an explicit stream."""

_OUT_OF_MEMORY, _NOT_INITIALIZED = 2, 3
# Illegal address, assert, stack, instruction, …, launch.
_CONTEXT_LOST = (700, 710, 714, 715, 716, 717, 718, 719)
# Stub, old driver, …, no device, mismatch, unknown.
_NO_GPU = (34, 35, 36, 100, 101, 803, 804, 999)


class DeviceMemory:
    """Memory on the GPU. It is freed with this object; freeing waits for the GPU."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.pointer = pointer
        """Address on the GPU."""
        self.nbytes = nbytes
        """Size in bytes."""


class PinnedMemory:
    """Page-locked host memory for asynchronous copies. It is freed with this object."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self._bytes = memoryview((ctypes.c_ubyte * nbytes).from_address(pointer)).cast("B")
        self.nbytes = nbytes
        """Size in bytes."""

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return the start of the memory as an array, which must not outlive this object."""
        return np.ndarray(shape, dtype, self._bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTimes:
    """GPU times of one batch, measured with CUDA events.

    `runtime.bench.results` lists trtexec's names for them.
    """

    h2d_ms: float
    """Copying the images from pinned memory to the GPU."""
    compute_ms: float
    """The network's kernels."""
    d2h_ms: float
    """Copying the outputs to the CPU."""
    enqueue_ms: float
    """Host time to enqueue all of this on the stream."""

    @property
    def latency_ms(self) -> float:
        """Sum of both copies and the kernels."""
        return self.h2d_ms + self.compute_ms + self.d2h_ms


class Cuda:
    """The first visible GPU. Thread-safe.

    Pointers and streams are plain integers. Enqueue work and allocate memory inside `current` only.
    """

    def __init__(self, api: Any) -> None:
        """Retain the primary context of the first visible GPU.

        Args:
            api: the module `cuda.bindings.driver`, as returned by `load_bindings`.

        Raises:
            BackendUnavailable: there is no driver or no GPU.
            InputError: CUDA was initialized before this process was forked.
        """
        self._api = api
        self._process = os.getpid()
        self._this_thread = threading.local()
        # Reentrant: garbage collection may free memory while the lock is held.
        self._lock = threading.RLock()
        self._deferred: list[tuple[str, Any, int]] = []
        self.allocated_bytes = 0
        """Bytes of GPU memory from `device_memory` that are not freed yet."""
        try:
            self._call("cuInit", 0)
            self._device = self._call("cuDeviceGet", 0)
            self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        except RuntimeError as error:  # raised by cuda-bindings without a driver library
            raise BackendUnavailable(f"CUDA cannot be used: {first_line(error)}") from error
        weakref.finalize(self, _release_context, api, self._device, self._process).atexit = False

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the primary context current in this thread, and restore the previous one afterwards.

        Raises:
            InputError: this process was forked after the object was created.
        """
        check_not_forked(self._process, "CUDA")
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    # Memory.

    def free_bytes(self) -> int:
        """Return the number of free bytes of GPU memory."""
        free, _ = self._call("cuMemGetInfo")
        return int(free)

    def device_memory(self, nbytes: int, what: str) -> DeviceMemory:
        """Allocate GPU memory.

        Args:
            nbytes: size in bytes.
            what: purpose of the memory, for error messages.

        Raises:
            RunFailed: not enough memory is free.
        """
        nbytes = max(nbytes, 1)
        memory = DeviceMemory(int(self._call("cuMemAlloc", nbytes, what=f"{what}, {nbytes:,} bytes")), nbytes)
        with self._lock:
            self.allocated_bytes += nbytes
        weakref.finalize(memory, self._release, "cuMemFree", memory.pointer, nbytes).atexit = False
        return memory

    def pinned_memory(self, nbytes: int, what: str) -> PinnedMemory:
        """Allocate page-locked host memory. Arguments and errors are those of `device_memory`."""
        nbytes = max(nbytes, 1)
        pointer = int(
            self._call("cuMemHostAlloc", nbytes, self._api.CU_MEMHOSTALLOC_PORTABLE, what=f"{what}, {nbytes:,} bytes")
        )
        memory = PinnedMemory(pointer, nbytes)
        weakref.finalize(memory, self._release, "cuMemFreeHost", pointer, 0).atexit = False
        return memory

    def check_pointer(self, pointer: int) -> None:
        """Raise InputError unless `pointer` is in memory of this GPU."""
        attribute = self._api.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        status, *ordinal = self._api.cuPointerGetAttribute(attribute, pointer)
        if int(status) != 0 or int(ordinal[0]) != int(self._device):
            found = "memory unknown to CUDA" if int(status) else f"memory of GPU {int(ordinal[0])}"
            raise InputError(f"the array's address is in {found}; expected memory of GPU {int(self._device)}")

    # Streams and events.

    def stream(self) -> int:
        """Create a stream that does not wait for the default stream; `close_stream` destroys it."""
        return int(self._call("cuStreamCreate", self._api.CUstream_flags.CU_STREAM_NON_BLOCKING))

    def close_stream(self, stream: int) -> None:
        """Destroy a stream once its pending work is done."""
        self._call("cuStreamDestroy", stream)

    def event(self) -> int:
        """Create an event without timing; `close_event` destroys it."""
        return int(self._call("cuEventCreate", self._api.CUevent_flags.CU_EVENT_DISABLE_TIMING))

    def close_event(self, event: int) -> None:
        """Destroy an event."""
        self._call("cuEventDestroy", event)

    def timer(self) -> int:
        """Create an event with timing, for `record` and `elapsed_ms`; `close_event` destroys it."""
        return int(self._call("cuEventCreate", self._api.CUevent_flags.CU_EVENT_DEFAULT))

    def record(self, timer: int, stream: int) -> None:
        """Record a timer once all work that is on `stream` now is done."""
        self._call("cuEventRecord", timer, stream)

    def elapsed_ms(self, first: int, last: int) -> float:
        """Return the milliseconds between two recorded timers."""
        return float(self._call("cuEventElapsedTime", first, last))

    def wait_for(self, stream: int, other: int, event: int) -> None:
        """Make later work on `stream` wait for the work on `other`. `event` is overwritten."""
        self._call("cuEventRecord", event, other)
        self._call("cuStreamWaitEvent", stream, event, 0)

    def synchronize(self, stream: int) -> None:
        """Block until all work on `stream` is done. Raises RunFailed if some of it failed."""
        self._call("cuStreamSynchronize", stream)

    def synchronize_after_failure(self, stream: int) -> None:
        """Block until all work on `stream` is done, and ignore further failures."""
        with suppress(RunFailed):
            self._call("cuStreamSynchronize", stream)

    # Copies. They are asynchronous.

    def copy_to_device(self, pointer: int, source: NDArray[Any], stream: int) -> None:
        """Copy a contiguous array to the GPU. The call is asynchronous for pinned memory only."""
        self._call("cuMemcpyHtoDAsync", pointer, source.ctypes.data, source.nbytes, stream)

    def copy_to_host(self, target: NDArray[Any], pointer: int, stream: int) -> None:
        """Fill a contiguous array with GPU memory."""
        self._call("cuMemcpyDtoHAsync", target.ctypes.data, pointer, target.nbytes, stream)

    def copy_on_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy within GPU memory."""
        self._call("cuMemcpyDtoDAsync", target, source, nbytes, stream)

    # Graphs.

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Any:
        """Capture the work that `enqueue` puts on `stream` as a graph, without running it.

        Returns:
            A graph for `launch`; `close_graph` destroys it.

        Raises:
            RunFailed: the work cannot be captured. The stream stays usable.
        """
        mode = self._api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", stream, mode)
        # Garbage collection may free memory during the capture, which would invalidate it.
        self._this_thread.capturing = True
        failed = True
        try:
            enqueue()
            failed = False
        finally:
            status, *graph = self._api.cuStreamEndCapture(stream)
            self._this_thread.capturing = False
            self._release_deferred()
            if failed and int(status) == 0:
                self._api.cuGraphDestroy(graph[0])
        self._check(status, "cuStreamEndCapture")
        try:
            return self._call("cuGraphInstantiate", graph[0], 0)
        finally:
            self._api.cuGraphDestroy(graph[0])

    def launch(self, graph: Any, stream: int) -> None:
        """Enqueue a captured graph on `stream`."""
        self._call("cuGraphLaunch", graph, stream)

    def close_graph(self, graph: Any) -> None:
        """Destroy a graph that is not running."""
        self._call("cuGraphExecDestroy", graph)

    # Memory is freed by finalizers, in any thread and at any time.

    def _release(self, name: str, handle: Any, nbytes: int) -> None:
        if os.getpid() != self._process:
            return  # a forked child: the memory belongs to its parent
        with self._lock:
            self.allocated_bytes -= nbytes
            if getattr(self._this_thread, "capturing", False):
                self._deferred.append((name, handle, 0))
                return
        try:
            with self.current():
                self._call(name, handle)
        except RunFailed as error:  # the context is lost, and its memory with it
            log.debug("%s: %s", name, error)

    def _release_deferred(self) -> None:
        with self._lock:
            deferred, self._deferred = self._deferred, []
        for name, handle, nbytes in deferred:
            self._release(name, handle, nbytes)

    def _call(self, name: str, *arguments: Any, what: str = "") -> Any:
        """Call a driver function and return its value, a tuple of its values, or None."""
        status, *values = getattr(self._api, name)(*arguments)
        self._check(status, name, what)
        return values[0] if len(values) == 1 else tuple(values) or None

    def _check(self, status: Any, name: str, what: str = "") -> None:
        code = int(status)
        if code == 0:
            return
        if code == _OUT_OF_MEMORY:
            known, *memory = self._api.cuMemGetInfo()
            free = f", {int(memory[0]):,} of {int(memory[1]):,} bytes are free" if int(known) == 0 else ""
            place = "there is no more page-locked memory" if name == "cuMemHostAlloc" else "the GPU is out of memory"
            raise RunFailed(
                f"{place}: requested {what or name}{free}",
                fix="use smaller batches (an engine's largest batch is set when it is built) or fewer contexts, or "
                "stop other programs on the GPU",
            )
        if code == _NOT_INITIALIZED:
            raise InputError(
                "this process was forked from a process that uses CUDA, and cannot use CUDA itself",
                fix="start processes with the spawn method, or fork before CUDA is used",
            )
        if code in _NO_GPU and name.startswith(("cuInit", "cuDevice")):
            raise BackendUnavailable(f"CUDA cannot be used: {self._describe(status)}")
        if code in _CONTEXT_LOST:
            raise RunFailed(
                f"{name} failed: {self._describe(status)}; this process can no longer use the GPU", fix="restart it"
            )
        raise RunFailed(f"{name} failed: {self._describe(status)}")

    def _describe(self, status: Any) -> str:
        known, text = self._api.cuGetErrorString(status)
        description = text.decode(errors="replace") if int(known) == 0 and text else "unknown error"
        return f"{description} ({getattr(status, 'name', int(status))})"


def _release_context(api: Any, device: Any, process: int) -> None:
    if os.getpid() == process:
        api.cuDevicePrimaryCtxRelease(device)


def load_bindings() -> Any:
    """Return the module `cuda.bindings.driver`. Raises BackendUnavailable if it is missing."""
    try:
        from cuda.bindings import driver
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendUnavailable(
            f"cuda-bindings cannot be imported ({first_line(error)})", fix="pip install 'cuda-bindings>=12.6'"
        ) from error
    return driver
