"""Pass damaged and malicious files of every kind to their readers.

    python -m benchmarks.fuzz --minutes 10           all kinds, in two processes
    python -m benchmarks.fuzz --kinds images specs   some kinds, for a minute
    python -m benchmarks.fuzz --case images 4711     one case again, with its traceback
    python -m benchmarks.fuzz --native               only ONNX files, passed on to TensorRT-RTX

A case fails if it raises an error that is not advprop's own, takes over 10 seconds, needs over a
gigabyte of memory (the whole process, torch included), or ends the process. Expected: none of 100,000 cases in
ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support.fuzzing import KINDS, NATIVE, run_case

_MAX_SECONDS = 10.0
_MAX_BYTES = 10**9
_MEMORY = "/dev/shm"
"""A file system in memory: case files are written to disk otherwise."""
_NEED_TORCH = ("tar files", "config.toml", "checkpoints")
_Case = tuple[str, int]


@dataclass(slots=True)
class Totals:
    """Results of the cases of one kind."""

    results: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    peak_bytes: int = 0


def cases(kinds: Sequence[str], first: int, step: int) -> Iterator[_Case]:
    """Yield cases of all kinds in turn, more of those that are read quickly."""
    for turn in itertools.count():
        for kind in kinds:
            share = KINDS[kind].share if kind in KINDS else 1
            yield from ((kind, first + step * (turn * share + place)) for place in range(share))


def run_cases(kinds: Sequence[str], first: int, step: int, skip: int, out: Connection) -> None:
    """Run cases in this process until it is ended.

    Sends None when it is ready; before each case its kind and seed, so the parent knows which case
    ended the process; and after it the result, traceback, seconds and peak memory in bytes.
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff writes there
    with tempfile.TemporaryDirectory(dir=_MEMORY if Path(_MEMORY).is_dir() else None) as folder:
        for kind in kinds:
            with contextlib.suppress(Exception):
                run_case(kind, 0, Path(folder))  # imports what it needs
        out.send(None)
        for kind, seed in itertools.islice(cases(kinds, first, step), skip, None):
            out.send((kind, seed))
            start = time.monotonic()
            result, trace = "", ""
            try:
                result = run_case(kind, seed, Path(folder))
            except Exception:
                trace = traceback.format_exc()
            out.send(
                (result, trace, time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            )


class Worker:
    """A process that runs cases, and is replaced when a case ends it."""

    def __init__(self, kinds: Sequence[str], first: int, step: int, totals: dict[str, Totals]) -> None:
        self._arguments, self._totals = (kinds, first, step), totals
        self._done = 0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe(duplex=False)
        self._process = context.Process(target=run_cases, args=(*self._arguments, self._done, there), daemon=True)
        self._process.start()
        there.close()
        self._case: _Case | None = None
        self._since = time.monotonic()
        self.ready = False

    def poll(self) -> Iterator[str]:
        """Yield the failures since the last call, and replace the process if it ended or hangs."""
        try:
            while self._pipe.poll():
                yield from self._receive(self._pipe.recv())
        except EOFError:
            self._process.join()
            yield from self._replace(f"the process ended with exit code {self._process.exitcode}")
        if self._case is not None and time.monotonic() - self._since > _MAX_SECONDS:
            yield from self._replace(f"no result after {_MAX_SECONDS:g} s")

    def _receive(self, message: Any) -> Iterator[str]:
        if message is None:
            self.ready = True
            return
        if len(message) == 2:
            self._case, self._since = message, time.monotonic()
            return
        assert self._case is not None
        kind, seed = self._case
        result, trace, seconds, peak = message
        totals = self._totals[kind]
        totals.results[result or "FAILED"] += 1
        totals.slowest_s, totals.peak_bytes = max(totals.slowest_s, seconds), max(totals.peak_bytes, peak)
        self._case = None
        self._done += 1
        if trace:
            yield f"--case {kind!r} {seed}\n{trace}"
        if peak > _MAX_BYTES:
            self._case = (kind, seed)
            self._done -= 1
            yield from self._replace(f"{peak / 1e9:.2f} GB")

    def _replace(self, reason: str) -> Iterator[str]:
        self.stop()
        if self._case is not None:
            kind, seed = self._case
            self._totals[kind].results["FAILED"] += 1
            yield f"--case {kind!r} {seed}: {reason}"
            self._done += 1
        self._start()

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def run(kinds: Sequence[str], seconds: float, workers: int, first: int) -> tuple[dict[str, Totals], list[str]]:
    """Run cases for some seconds. Return the totals of each kind, and the failures."""
    totals = {kind: Totals() for kind in kinds}
    failures: list[str] = []
    # torch alone needs almost a gigabyte, so what needs it has processes of its own.
    groups = [
        group for group in ([kind for kind in kinds if (kind in _NEED_TORCH) == torch] for torch in (0, 1)) if group
    ]
    each = max(1, workers // len(groups))
    running = [Worker(group, first + number, each, totals) for group in groups for number in range(each)]
    end = float("inf")
    while time.monotonic() < end:
        time.sleep(0.02)
        if end == float("inf") and all(worker.ready for worker in running):
            end = time.monotonic() + seconds
        for worker in running:
            for failure in worker.poll():
                failures.append(failure)
                print(failure, flush=True)
    for worker in running:
        worker.stop()
    return totals, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="minutes to run (default: 1)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--first", type=int, default=0, help="first seed (default: 0)")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=[*KINDS, *NATIVE], help="kinds of input")
    parser.add_argument("--native", action="store_true", help="pass ONNX files to TensorRT-RTX, in a child process")
    parser.add_argument("--case", nargs=2, metavar=("KIND", "SEED"), help="run one case here")
    arguments = parser.parse_args()
    if arguments.case:
        with tempfile.TemporaryDirectory() as folder:
            print(run_case(arguments.case[0], int(arguments.case[1]), Path(folder)))
        return
    kinds = list(NATIVE) if arguments.native else arguments.kinds
    totals, failures = run(kinds, 60 * arguments.minutes, arguments.workers, arguments.first)
    for kind, found in totals.items():
        results = ", ".join(f"{count:,} {name}" for name, count in found.results.most_common())
        print(
            f"{kind}: {found.results.total():,} cases, slowest {found.slowest_s:.2f} s, process at most "
            f"{found.peak_bytes / 1e6:.0f} MB: {results}"
        )
    count = sum(found.results.total() for found in totals.values())
    print(f"{count:,} cases in {arguments.minutes:g} minutes, {len(failures)} failures")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
