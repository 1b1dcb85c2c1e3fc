"""Let every call of the batching code fail once, while clients use a session; print what happened.

    python -m tests.support.batching_faults MODEL.onnx IMAGE.png

MODEL fails on images that contain 1 or more (`FRAGILE`). The last line is a JSON object.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import json
import logging
import sys
import threading
import time
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.faults import install

MODULES = [f"runtime.batching.{name}" for name in ("core", "queue", "batcher", "decoder", "statistics")]
FAULTS = [
    (MemoryError, 1, 1),
    (SystemExit, 1, 2),
    (KeyboardInterrupt, 2, 1),
    (asyncio.CancelledError, 1, 1),
    (RuntimeError, 3, 2),
]
"""Error, the first execution that fails, and the number of executions that fail."""
LIMIT_S = 5.0


def main(model: Path, image: Path) -> None:
    """Inject every error at every call."""
    faulthandler.enable()
    logging.disable(logging.CRITICAL)
    threading.excepthook = lambda args: problems.append(f"a thread ended: {args.exc_type.__name__}")
    faults = install(MODULES)
    import runtime

    runtime.load(model, device="cpu", threads=1).close()
    problems: list[str] = []
    reached: set[int] = set()
    slowest_close_s = 0.0
    start = time.monotonic()
    for place in range(len(faults.places)):
        for error, first, times in FAULTS:
            faults.arm(-1, error)
            session = runtime.load(
                model,
                device="cpu",
                threads=1,
                batching=runtime.Batching(max_batch=2, max_delay_us=200, decode_threads=1),
            )
            where = f"{faults.places[place]}, {error.__name__} at {first}"
            faults.arm(place, error, first, times)
            problems += [f"{where}: {problem}" for problem in use(session, image)]
            last: list[Future[Any]] = []
            if not problems:
                last = [session.submit(batch(0.3)), session.submit_predict([image])]
            close_s, problem = close(session, drain=times == 1)
            problems += [f"{where}: a request outlives close"] if not all(future.done() for future in last) else []
            slowest_close_s = max(slowest_close_s, close_s)
            problems += [f"{where}: {problem}"] if problem else []
            if faults.hits:
                reached.add(place)
    print(
        json.dumps(
            {
                "places": len(faults.places),
                "unreached": [faults.places[place] for place in range(len(faults.places)) if place not in reached],
                "faults": len(reached) * len(FAULTS),
                "problems": problems,
                "slowest_close_s": round(slowest_close_s, 2),
                "seconds": round(time.monotonic() - start, 1),
            }
        )
    )


def batch(*values: float) -> np.ndarray:
    """Return one image per value, filled with it."""
    return np.repeat(np.asarray(values, np.float32), 48).reshape(-1, 3, 4, 4)


def use(session: Any, image: Path) -> list[str]:
    """Send requests of every kind; return what went wrong."""
    problems: list[str] = []
    futures: list[tuple[str, Future[Any], Any]] = []

    def submit(name: str, call: Any, expected: Any) -> None:
        try:
            futures.append((name, call(), expected))
        except BaseException as error:
            if "injected" not in f"{error} {error.__cause__}":
                problems.append(f"{name} raised {error!r}")

    def in_thread() -> None:
        submit("one", lambda: session.submit(batch(0.25)), [0.25])
        submit("three", lambda: session.submit(batch(0.1, 0.2, 0.3)), [0.1, 0.2, 0.3])
        submit("broken", lambda: session.submit(batch(2.0)), None)
        submit("late", lambda: session.submit(batch(0.4), timeout_s=1e-6), None)

    thread = threading.Thread(target=in_thread)
    thread.start()
    submit("image", lambda: session.submit_predict([image]), "prediction")
    submit("no image", lambda: session.submit_predict([b"no image"]), None)
    submit("canceled", lambda: canceled(session.submit(batch(0.5))), None)
    submit("callback", lambda: with_callback(session.submit(batch(0.75))), [0.75])
    thread.join()
    _, pending = wait([future for _, future, _ in futures], LIMIT_S)
    problems += [f"{name} has not ended" for name, future, _ in futures if future in pending]
    for name, future, expected in futures:
        if future in pending or future.cancelled() or future.exception() or expected in (None, "prediction"):
            continue
        if not np.allclose(future.result()[:, 0], expected, atol=1e-6):
            problems.append(f"{name} got the answer of another request")
    if pending:
        return problems
    for attempt in range(5):  # the fault may hit one of the later requests instead
        try:
            answer = session.submit(batch(0.6)).result(LIMIT_S)
            asyncio.run(session.arun(batch(0.6)))
            stats = session.stats.batcher
        except BaseException as error:
            if attempt == 4:
                problems.append(f"later requests are not served: {error!r}")
            continue
        if not np.allclose(answer, 0.6):
            problems.append("a later request got the answer of another one")
        ended = stats.answered + stats.cancelled + stats.late + stats.failed
        if stats.pending or stats.waiting_images or stats.submitted != ended:
            problems.append(f"the statistics are inconsistent: {stats}")
        break
    return problems


def canceled(future: Future[Any]) -> Future[Any]:
    """Cancel a request."""
    future.cancel()
    return future


def with_callback(future: Future[Any]) -> Future[Any]:
    """Let a callback of a request raise an error that is no Exception."""

    def end(done: Future[Any]) -> None:
        raise SystemExit

    with contextlib.suppress(SystemExit):  # raised here if the request had ended
        future.add_done_callback(end)
    return future


def close(session: Any, *, drain: bool) -> tuple[float, str]:
    """Close a session; return the seconds, and what went wrong."""
    errors: list[BaseException] = []

    def run() -> None:
        for _ in range(3):  # the error of a call of `close` goes to its caller, who can repeat the call
            try:
                session.close(drain=drain)
                return
            except BaseException as error:
                errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    start = time.monotonic()
    thread.start()
    thread.join(LIMIT_S)
    if thread.is_alive():
        return LIMIT_S, "close has not returned"
    if errors and "injected" not in str(errors[0]):
        return time.monotonic() - start, f"close raised {errors[0]!r}"
    return time.monotonic() - start, ""


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
