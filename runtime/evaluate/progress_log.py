"""`ProgressLog`: a file of finished work that a later run of the same plan resumes from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from runtime.errors import OutputError
from runtime.system.files import output_dir

__all__ = ["ProgressLog"]


class ProgressLog:
    """A JSON-lines file with one entry per finished piece of work.

    The file is named after a hash of the plan, so runs with other plans use other files. A line
    that is incomplete because the process was killed is dropped.
    """

    def __init__(
        self, folder: Path, plan: Mapping[str, Any], restore: Callable[[Any], None], *, advice: str = ""
    ) -> None:
        """Open the log of a plan, and pass every entry of an earlier run to `restore`.

        Args:
            folder: folder of the file; it is created if necessary.
            plan: everything that the results depend on, as plain values.
            restore: called with each entry, whether it was read or has just been appended. It
                raises ValueError, KeyError or TypeError if it cannot use a line that was read;
                that line and all later ones are dropped.
            advice: further advice for the error message if another process runs the same plan.

        Raises:
            OutputError: the folder cannot be written, or another process runs the same plan.
        """
        text = json.dumps(plan, sort_keys=True)
        self.path = output_dir(folder) / f".unfinished-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        self._restore = restore
        try:
            self._file = self.path.open("a+b")
            self._lock(advice)
            self._file.truncate(self._read())
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _lock(self, advice: str) -> None:
        """Lock the file. The operating system releases the lock when the process ends."""
        if os.name != "posix":
            return
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise OutputError(
                f"another process runs the same evaluation and writes to {self.path}; wait for it or stop it{advice}"
            ) from error

    def _read(self) -> int:
        """Restore the entries of an earlier run; return the length of the valid lines in bytes."""
        self._file.seek(0)
        valid = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            try:
                self._restore(json.loads(line))
            except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
                break
            valid += len(line)
        return valid

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write an entry to disk and pass it to `restore`.

        Raises:
            OutputError: the file cannot be written.
        """
        try:
            self._file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}; is the disk full?") from error
        self._restore(entry)

    def remove(self) -> None:
        """Delete the file. Call this when the results contain everything in the log."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
