"""What an evaluation has done so far, on disk line by line: whoever is killed goes on where they were.

Each line is JSON: one finished block of images, with the counts of every model. A line that was cut off by the kill is
dropped. The file is named after everything that the counts follow from: no other evaluation takes it for its own.
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
from runtime.files import output_dir

__all__ = ["Journal"]

Unit = tuple[str, int]
"""A cell, and the number of a block of its images."""


class Journal:
    """The finished blocks of one evaluation."""

    def __init__(self, folder: Path, plan: Mapping[str, Any]) -> None:
        """Opens the journal of an evaluation, with what an earlier run of the very same has done.

        Args:
            folder: where it is; made if need be.
            plan: plain values that say all that the counts follow from. Another plan is another journal.

        Raises:
            OutputError: the folder cannot be written.
        """
        text = json.dumps(plan, sort_keys=True)
        self.path = output_dir(folder) / f".unfinished-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        self.done: set[Unit] = set()
        self.totals: dict[str, list[Counts]] = {}
        try:
            self._file = self.path.open("a+b")
            self._lock()
            self._file.truncate(self._read())
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from error

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
                f"another process is at this very evaluation and writes to {self.path}; wait for it, end it, or give "
                "each one --shard of its own"
            ) from error

    def _read(self) -> int:
        """Reads the finished blocks, and returns how many bytes of the file are whole lines."""
        self._file.seek(0)
        whole = 0
        for line in self._file:
            try:
                entry = json.loads(line)
                counts = [Counts.from_dict(item) for item in entry["counts"]]
                unit = (str(entry["cell"]), int(entry["block"]))
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            self._note(unit, counts)
            whole += len(line)
        return whole

    def add(self, cell: str, block: int, counts: list[Counts]) -> None:
        """Notes a finished block, with the counts of every model. Raises OutputError."""
        entry = {"cell": cell, "block": block, "counts": [item.to_dict() for item in counts]}
        try:
            self._file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}; is the disk full?") from error
        self._note((cell, block), counts)

    def _note(self, unit: Unit, counts: list[Counts]) -> None:
        cell, _ = unit
        before = self.totals.get(cell)
        self.done.add(unit)
        self.totals[cell] = [a + b for a, b in zip(before, counts, strict=True)] if before else counts

    def finish(self) -> None:
        """Removes the journal: its counts are in the results."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
