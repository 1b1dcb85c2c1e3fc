"""A STAND-IN for the GPU, which tests how our code uses it. It contains no CUDA.

`StandInDriver` implements the functions of `cuda.bindings.driver` that `runtime.device.driver`
calls, with CPU memory. Enqueued work runs only at a synchronization. Memory that is modified, freed
or read too early therefore gives wrong outputs or an error. It does not show how a real GPU
behaves.
"""

# ruff: noqa: N802  # CUDA's names

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

OK, INVALID, OUT_OF_MEMORY = 0, 1, 2
Work = Callable[[], None]


class StandInDriver:
    """Its memory is CPU memory, and a stream is a list of work."""

    CU_MEMHOSTALLOC_PORTABLE = 1
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = SimpleNamespace(CU_EVENT_DEFAULT=0, CU_EVENT_DISABLE_TIMING=2)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUpointer_attribute = SimpleNamespace(CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL=9)

    def __init__(self, total: int = 1 << 30) -> None:
        self.total = total
        self.memory: dict[int, Any] = {}
        self.device: set[int] = set()
        self.streams: dict[int, list[Work]] = {1: []}
        self.recording: dict[int, list[Work]] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.events: dict[int, tuple[int, int]] = {}
        self.done: dict[int, int] = {}
        self.counts: dict[str, int] = {}
        self.fails: dict[str, int] = {}
        self.pushed = threading.local()
        self.numbers = itertools.count(1000)
        self.lock = threading.RLock()

    def __getattribute__(self, name: str) -> Any:
        """Count calls, and let those in `fails` fail."""
        value = object.__getattribute__(self, name)
        if not name.startswith("cu"):
            return value
        with self.lock:
            self.counts[name] = self.counts.get(name, 0) + 1
            code = self.fails.get(name)
            if name == "cuStreamEndCapture" and code is not None:
                self.recording.clear()  # a failed capture ends too
        return value if code is None else lambda *_: (code, *[None] * 2)

    @property
    def used(self) -> int:
        return sum(self.memory[pointer][1] for pointer in self.device)

    def find(self, pointer: int, nbytes: int) -> None:
        """Fail unless that memory is allocated."""
        with self.lock:
            blocks = [(start, size) for start, (_, size) in self.memory.items()]
        assert any(start <= pointer and pointer + nbytes <= start + size for start, size in blocks), "not allocated"

    def enqueue(self, stream: int, work: Work) -> None:
        assert getattr(self.pushed, "depth", 0) > 0, "no context is current"
        self.recording.get(stream, self.streams[stream]).append(work)

    def drain(self, stream: int, upto: int = 1 << 60) -> None:
        work = self.streams[stream]
        while work and self.done.get(stream, 0) < upto:
            self.done[stream] = self.done.get(stream, 0) + 1
            work.pop(0)()

    def _allocate(self, nbytes: int) -> int:
        assert getattr(self.pushed, "depth", 0) > 0, "no context is current"
        block = (ctypes.c_ubyte * (nbytes + 256))()
        ctypes.memset(block, 0xFF, nbytes + 256)  # NaN: reading it unwritten gives wrong outputs
        pointer = -(-ctypes.addressof(block) // 256) * 256
        self.memory[pointer] = (block, nbytes)
        return pointer

    def cuInit(self, flags: int) -> tuple[Any, ...]:
        return (OK,)

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        return OK, ordinal

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, ...]:
        return OK, 77

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Any, ...]:
        return (OK,)

    def cuCtxPushCurrent(self, context: int) -> tuple[Any, ...]:
        self.pushed.depth = getattr(self.pushed, "depth", 0) + 1
        return (OK,)

    def cuCtxPopCurrent(self) -> tuple[Any, ...]:
        self.pushed.depth -= 1
        return OK, 77

    def cuMemGetInfo(self) -> tuple[Any, ...]:
        return OK, self.total - self.used, self.total

    def cuMemAlloc(self, nbytes: int) -> tuple[Any, ...]:
        with self.lock:
            if self.used + nbytes > self.total:
                return OUT_OF_MEMORY, None
            pointer = self._allocate(nbytes)
            self.device.add(pointer)
            return OK, pointer

    def cuMemFree(self, pointer: int) -> tuple[Any, ...]:
        assert not self.recording, "freed during a capture"
        with self.lock:
            self.device.remove(pointer)
            del self.memory[pointer]
        return (OK,)

    def cuMemHostAlloc(self, nbytes: int, flags: int) -> tuple[Any, ...]:
        with self.lock:
            return OK, self._allocate(nbytes)

    def cuMemFreeHost(self, pointer: int) -> tuple[Any, ...]:
        with self.lock:
            del self.memory[pointer]
        return (OK,)

    def cuPointerGetAttribute(self, attribute: int, pointer: int) -> tuple[Any, ...]:
        with self.lock:
            known = [start for start in self.device if start <= pointer < start + self.memory[start][1]]
        return (OK, 0) if known else (INVALID, None)

    def cuStreamCreate(self, flags: int) -> tuple[Any, ...]:
        stream = next(self.numbers)
        self.streams[stream] = []
        return OK, stream

    def cuStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        self.drain(stream)
        del self.streams[stream]
        return (OK,)

    def cuStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        assert stream not in self.recording, "synchronized during a capture"
        self.drain(stream)
        return (OK,)

    def cuEventCreate(self, flags: int) -> tuple[Any, ...]:
        return OK, next(self.numbers)

    def cuEventDestroy(self, event: int) -> tuple[Any, ...]:
        self.events.pop(event, None)
        return (OK,)

    def cuEventRecord(self, event: int, stream: int) -> tuple[Any, ...]:
        self.events[event] = (stream, self.done.get(stream, 0) + len(self.streams[stream]))
        return (OK,)

    def cuEventElapsedTime(self, first: int, last: int) -> tuple[Any, ...]:
        """One millisecond for each piece of work between the two events, which must be done."""
        (stream, begin), (same, end) = self.events[first], self.events[last]
        assert stream == same and self.done.get(stream, 0) >= end, "not done"
        return OK, float(end - begin)

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[Any, ...]:
        other, upto = self.events[event]
        self.enqueue(stream, lambda: self.drain(other, upto))
        return (OK,)

    def _copy(self, target: int, source: int, nbytes: int, stream: int, places: tuple[int, ...]) -> tuple[Any, ...]:
        def work() -> None:
            for place in places:
                self.find(place, nbytes)
            ctypes.memmove(target, source, nbytes)

        self.enqueue(stream, work)
        return (OK,)

    def cuMemcpyHtoDAsync(self, target: int, source: int, nbytes: int, stream: int) -> tuple[Any, ...]:
        return self._copy(target, source, nbytes, stream, (target,))

    def cuMemcpyDtoHAsync(self, target: int, source: int, nbytes: int, stream: int) -> tuple[Any, ...]:
        return self._copy(target, source, nbytes, stream, (source,))

    def cuMemcpyDtoDAsync(self, target: int, source: int, nbytes: int, stream: int) -> tuple[Any, ...]:
        return self._copy(target, source, nbytes, stream, (target, source))

    def cuStreamBeginCapture(self, stream: int, mode: int) -> tuple[Any, ...]:
        self.recording[stream] = []
        return (OK,)

    def cuStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        graph = next(self.numbers)
        self.graphs[graph] = self.recording.pop(stream)
        return OK, graph

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        number = next(self.numbers)
        self.graphs[number] = list(self.graphs[graph])
        return OK, number

    def cuGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        del self.graphs[graph]
        return (OK,)

    def cuGraphExecDestroy(self, graph: int) -> tuple[Any, ...]:
        del self.graphs[graph]
        return (OK,)

    def cuGraphLaunch(self, graph: int, stream: int) -> tuple[Any, ...]:
        for work in self.graphs[graph]:
            self.enqueue(stream, work)
        return (OK,)

    def cuGetErrorString(self, code: int) -> tuple[Any, ...]:
        return OK, {INVALID: b"invalid argument", 700: b"an illegal memory access"}.get(code, b"some error")
