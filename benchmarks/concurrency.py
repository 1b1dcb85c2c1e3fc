"""Send many requests at once, cancel some, and count lost and wrong answers.

    python -m benchmarks.concurrency                             64 threads × 500, 2,000 tasks, a second
    python -m benchmarks.concurrency --threads 256 --requests 2000

The network returns the mean color of each image, and each image of the run has its own color. An
answer that belongs to another request therefore differs. Of the requests, 10 % are canceled, 5 %
have a deadline that passes, and the queue is too short for the load, so some are refused.

A request is lost if it does not end within a minute, or if the batcher counts it differently from
the client. The script exits with 1 if a request is lost or has a wrong answer.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import runtime
from runtime.errors import DeadlineExceeded, QueueFull
from tests.support.serving_models import images_of, open_session

CANCELED, LATE = 0.10, 0.05
"""Shares of requests that are canceled, and that have a deadline of a tenth of a millisecond."""
LARGEST = 7
"""Images per request: 1 to this number."""
PATIENCE_S = 60.0


class Clients:
    """Sends requests, compares answers, and counts how requests end."""

    def __init__(self, session: runtime.Session) -> None:
        self.session = session
        self.ends: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._next = 0

    def images(self, count: int) -> NDArray[np.float32]:
        """Return images with colors that no other image of the run has."""
        with self._lock:
            first, self._next = self._next, self._next + count
        return images_of(*range(first, first + count))

    def count(self, end: str) -> None:
        with self._lock:
            self.ends[end] += 1

    def check(self, images_NCHW: NDArray[np.float32], logits_NK: NDArray[Any]) -> None:
        self.count("answered" if np.array_equal(logits_NK, images_NCHW.mean((2, 3))) else "crossed")

    def send_many(self, requests: int, seed: int) -> None:
        """Submit requests from one thread, up to eight at a time."""
        chance = random.Random(seed)
        waiting: list[tuple[NDArray[np.float32], Future[NDArray[Any]]]] = []
        for _ in range(requests):
            images_NCHW = self.images(chance.randint(1, LARGEST))
            kind = chance.random()
            try:
                future = self.session.submit(images_NCHW, timeout_s=1e-4 if kind < LATE else PATIENCE_S)
            except QueueFull:
                self.count("refused")
                time.sleep(0.001)
                continue
            if kind > 1 - CANCELED:
                future.cancel()
            waiting.append((images_NCHW, future))
            if len(waiting) == 8:
                self.wait_for(*waiting.pop(0))
        for images_NCHW, future in waiting:
            self.wait_for(images_NCHW, future)

    def wait_for(self, images_NCHW: NDArray[np.float32], future: Future[NDArray[Any]]) -> None:
        try:
            self.check(images_NCHW, future.result(timeout=PATIENCE_S))
        except CancelledError:
            self.count("cancelled")
        except DeadlineExceeded:
            self.count("late")
        except TimeoutError:
            self.count("lost")

    async def send_task(self, chance: random.Random) -> None:
        """Await one request, and cancel it if its turn comes."""
        images_NCHW = self.images(chance.randint(1, LARGEST))
        kind = chance.random()
        timeout_s = 1e-4 if kind < LATE else PATIENCE_S
        task = asyncio.ensure_future(self.session.arun(images_NCHW, timeout_s=timeout_s))
        if kind > 1 - CANCELED:
            await asyncio.sleep(chance.random() * 0.01)
            task.cancel()
        try:
            self.check(images_NCHW, await asyncio.wait_for(task, PATIENCE_S))
        except asyncio.CancelledError:
            self.count("cancelled")
        except DeadlineExceeded:
            self.count("late")
        except QueueFull:
            self.count("refused")
        except TimeoutError:
            self.count("lost")


def run_threads(clients: Clients, threads: int, requests: int) -> None:
    workers = [threading.Thread(target=clients.send_many, args=(requests, seed)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def run_tasks(clients: Clients, tasks: int) -> None:
    async def send_all() -> None:
        await asyncio.gather(*(clients.send_task(random.Random(seed)) for seed in range(tasks)))

    asyncio.run(send_all())


def faults(clients: Clients, expected: int) -> list[str]:
    """Return what is wrong with the counts of the clients and of the batcher."""
    ends, stats = clients.ends, clients.session.stats.batcher
    found = [f"{ends[end]:,} requests {end}" for end in ("lost", "crossed") if ends[end]]
    if ends.total() != expected:
        found.append(f"{expected:,} requests sent, {ends.total():,} ended")
    if stats.pending or stats.submitted != stats.answered + stats.cancelled + stats.late + stats.failed:
        found.append(f"the batcher's counts do not add up: {stats}")
    # A client that gives up may lose a race against its answer, so only sums are compared.
    if stats.submitted + stats.refused != expected:
        found.append(f"the batcher counted {stats.submitted + stats.refused:,} of {expected:,} requests")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--requests", type=int, default=500, help="Requests of each thread.")
    parser.add_argument("--tasks", type=int, default=2000, help="Tasks of asyncio, with one request each.")
    parser.add_argument("--queue", type=int, default=2000, help="Images that the queue can hold.")
    arguments = parser.parse_args()
    failed = False
    print("| clients | seconds | answered | canceled | late | refused | lost | crossed | images per batch |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, expected, work in (
        (
            f"{arguments.threads} threads × {arguments.requests}",
            arguments.threads * arguments.requests,
            lambda clients: run_threads(clients, arguments.threads, arguments.requests),
        ),
        (f"{arguments.tasks:,} tasks", arguments.tasks, lambda clients: run_tasks(clients, arguments.tasks)),
    ):
        with (
            tempfile.TemporaryDirectory() as folder,
            open_session(Path(folder), max_queued_images=arguments.queue) as session,
        ):
            clients = Clients(session)
            began = time.perf_counter()
            work(clients)
            seconds = time.perf_counter() - began
            found, ends = faults(clients, expected), clients.ends
            cells = [f"{ends[end]:,}" for end in ("answered", "cancelled", "late", "refused", "lost", "crossed")]
            print(f"| {name} | {seconds:.1f} | {' | '.join(cells)} | {session.stats.batcher.mean_batch:.1f} |")
        print("".join(f"\n{fault}" for fault in found), end="\n" if found else "")
        failed |= bool(found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
