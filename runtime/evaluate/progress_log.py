"""What an evaluation has done so far, on disk line by line: whoever is killed goes on where they were.

Each line is JSON: one finished piece of work, such as a block of images with the counts of every model. A line that was
cut off by the kill is dropped. The file is named after everything that the results follow from: no other evaluation
takes it for its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from runtime.errors import OutputError
from runtime.evaluate.counts import Counts
from runtime.system.files import output_dir

__all__ = ["Journal", "Lines"]

Unit = tuple[str, int]
"""A cell, and the number of a block of its images."""


class Lines:
    """Finished pieces of work, each a line of JSON. What they are is known to `_take`."""

    advice = ""
    """What else helps when another process does the same work."""

    def __init__(self, folder: Path, plan: Mapping[str, Any]) -> None:
        """Opens the journal of an evaluation, with what an earlier run of the very same has done.

        Args:
            folder: where it is; made if need be.
            plan: plain values that say all that the results follow from. Another plan is another journal.

        Raises:
            OutputError: the folder cannot be written.
        """
        text = json.dumps(plan, sort_keys=True)
        self.path = output_dir(folder) / f".unfinished-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        try:
            self._file = self.path.open("a+b")
            self._lock()
            self._file.truncate(self._read())
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _take(self, entry: Any) -> None:
        """Takes a line in. Raises ValueError, KeyError or TypeError where it is none."""
        raise NotImplementedError

    def _lock(self) -> None:
        """Keeps others out; the lock goes when the process does, however it ends."""
        if os.name != "posix":
            return
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise OutputError(
                f"another process is at this very evaluation and writes to {self.path}; wait for it or end it"
                f"{self.advice}"
            ) from error

    def _read(self) -> int:
        """Reads the finished pieces, and returns how many bytes of the file are whole lines."""
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError):
                break
            whole += len(line)
        return whole

    def write(self, entry: Mapping[str, Any]) -> None:
        """Notes a finished piece. Raises OutputError."""
        try:
            self._file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}; is the disk full?") from error
        self._take(entry)

    def finish(self) -> None:
        """Removes the journal: what it holds is in the results."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class Journal(Lines):
    """The finished blocks of one evaluation, with the counts of every model."""

    advice = ", or give each one --shard of its own"

    def __init__(self, folder: Path, plan: Mapping[str, Any]) -> None:
        """As `Lines`."""
        self.done: set[Unit] = set()
        self.totals: dict[str, list[Counts]] = {}
        super().__init__(folder, plan)

    def add(self, cell: str, block: int, counts: list[Counts]) -> None:
        """Notes a finished block, with the counts of every model. Raises OutputError."""
        self.write({"cell": cell, "block": block, "counts": [item.to_dict() for item in counts]})

    def _take(self, entry: Any) -> None:
        counts = [Counts.from_dict(item) for item in entry["counts"]]
        cell, block = str(entry["cell"]), int(entry["block"])
        before = self.totals.get(cell)
        self.totals[cell] = [a + b for a, b in zip(before, counts, strict=True)] if before else counts
        self.done.add((cell, block))
