"""Measurement loops: single calls, and several callers in a closed loop."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["LoadResult", "Probe", "measure_probe", "round_order", "run_closed_loop", "timed"]

Probe = Callable[[], Mapping[str, float]]
"""Makes one call and returns milliseconds by quantity."""


def round_order(count: int, number: int, seed: int) -> list[int]:
    """Return the random order of `count` targets in round `number`."""
    places = list(range(count))
    random.Random(f"{seed}/{number}").shuffle(places)
    return places


def timed(quantity: str, call: Callable[[], object]) -> Probe:
    """Return a probe that measures a blocking call with the host's clock."""

    def probe() -> dict[str, float]:
        start = time.perf_counter_ns()
        call()
        return {quantity: (time.perf_counter_ns() - start) / 1e6}

    return probe


def measure_probe(probe: Probe, seconds: float, min_calls: int) -> dict[str, list[float]]:
    """Call a probe for `seconds` and at least `min_calls` times.

    A first call is not counted, because the target before it has filled the caches.

    Returns:
        Milliseconds of each call, by quantity.
    """
    probe()
    found: dict[str, list[float]] = {}
    end = time.perf_counter() + seconds
    done = 0
    while done < min_calls or time.perf_counter() < end:
        for quantity, ms in probe().items():
            found.setdefault(quantity, []).append(ms)
        done += 1
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """Calls of several concurrent callers."""

    times_ms: list[float]
    """Duration of each call, caller by caller."""
    wall_s: float
    """Time from the start of the first call to the end of the last."""

    @property
    def calls_s(self) -> float:
        """Finished calls per second."""
        return len(self.times_ms) / self.wall_s


def run_closed_loop(call: Callable[[], object], callers: int, seconds: float, min_calls: int) -> LoadResult:
    """Call a function repeatedly from several threads, without pauses between calls.

    The first call of each thread is not counted. A single caller runs in the current thread.

    Args:
        call: a thread-safe function.
        callers: number of threads.
        seconds: duration; calls that have started by then are finished and counted.
        min_calls: minimum number of calls per thread.

    Raises:
        Exception: the first exception of a call; all threads stop, as with KeyboardInterrupt.
    """
    times: list[list[float]] = [[] for _ in range(callers)]
    errors: list[BaseException] = []
    stop = threading.Event()
    started = [0.0]
    barrier = threading.Barrier(callers, action=lambda: started.__setitem__(0, time.perf_counter()))
    ends = [0.0] * callers

    def work(place: int) -> None:
        try:
            call()
            barrier.wait()
            end = started[0] + seconds
            while not stop.is_set() and (len(times[place]) < min_calls or time.perf_counter() < end):
                before = time.perf_counter_ns()
                call()
                times[place].append((time.perf_counter_ns() - before) / 1e6)
            ends[place] = time.perf_counter()
        except threading.BrokenBarrierError:
            pass  # another thread failed before the start and reports the error
        except BaseException as error:  # the waiting thread raises it
            errors.append(error)
            stop.set()
            barrier.abort()

    if callers == 1:
        work(0)
    else:
        threads = [threading.Thread(target=work, args=(place,), name="advprop-bench") for place in range(callers)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:
            stop.set()
            barrier.abort()
            for thread in threads:
                thread.join()
            raise
    if errors:
        raise errors[0]
    return LoadResult(times_ms=[ms for own in times for ms in own], wall_s=max(ends) - started[0])
