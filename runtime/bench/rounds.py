"""Turns, rounds and crowds: the order in which contestants are run, and the loop that times them."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Crowd", "Probe", "crowd", "order", "timed", "turn"]

Probe = Callable[[], Mapping[str, float]]
"""Does one call, and returns milliseconds by quantity."""


def order(count: int, number: int, seed: int) -> list[int]:
    """Returns the order of `count` contestants in round `number`: shuffled, so that none always follows the same."""
    places = list(range(count))
    random.Random(f"{seed}/{number}").shuffle(places)
    return places


def timed(quantity: str, call: Callable[[], object]) -> Probe:
    """Makes a probe of a call that returns when its work is done, on the host's clock."""

    def probe() -> dict[str, float]:
        began = time.perf_counter_ns()
        call()
        return {quantity: (time.perf_counter_ns() - began) / 1e6}

    return probe


def turn(probe: Probe, seconds: float, least: int) -> dict[str, list[float]]:
    """Calls a probe for `seconds`, `least` times at the least.

    One call more comes first and is not counted: another contestant has just been in the caches.

    Returns:
        Milliseconds of each call, by quantity.
    """
    probe()
    found: dict[str, list[float]] = {}
    end = time.perf_counter() + seconds
    done = 0
    while done < least or time.perf_counter() < end:
        for quantity, ms in probe().items():
            found.setdefault(quantity, []).append(ms)
        done += 1
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """What several callers saw together."""

    times_ms: list[float]
    """Of each call, the callers' one after the other."""
    wall_s: float
    """From the first call's beginning to the last one's end."""

    @property
    def calls_s(self) -> float:
        """Calls that were answered a second."""
        return len(self.times_ms) / self.wall_s


def crowd(call: Callable[[], object], callers: int, seconds: float, least: int) -> Crowd:
    """Lets threads call in a closed loop: each again as soon as it has its answer.

    Each makes one call first that is not counted. One caller runs in this thread.

    Args:
        call: safe to call from several threads.
        callers: how many.
        seconds: how long; calls that have begun by then are finished and counted.
        least: calls of each caller at the least.

    Raises:
        Exception: the first that a call raised; the others stop then. KeyboardInterrupt stops them too.
    """
    times: list[list[float]] = [[] for _ in range(callers)]
    errors: list[BaseException] = []
    stop = threading.Event()
    began = [0.0]
    start = threading.Barrier(callers, action=lambda: began.__setitem__(0, time.perf_counter()))
    ends = [0.0] * callers

    def work(place: int) -> None:
        try:
            call()
            start.wait()
            end = began[0] + seconds
            while not stop.is_set() and (len(times[place]) < least or time.perf_counter() < end):
                before = time.perf_counter_ns()
                call()
                times[place].append((time.perf_counter_ns() - before) / 1e6)
            ends[place] = time.perf_counter()
        except threading.BrokenBarrierError:
            pass  # another caller failed before the start, and tells why
        except BaseException as error:  # told by the thread that waits
            errors.append(error)
            stop.set()
            start.abort()

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
            start.abort()
            for thread in threads:
                thread.join()
            raise
    if errors:
        raise errors[0]
    return Crowd(times_ms=[ms for own in times for ms in own], wall_s=max(ends) - began[0])
