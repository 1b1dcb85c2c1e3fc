"""`ProgressLog`: a file of finished work that a later run of the same plan resumes from."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from runtime.errors import DataError, OutputError
from runtime.system.files import output_dir

__all__ = ["ProgressLog"]

log = logging.getLogger(__name__)

_FORMAT = "progress log 2"
"""Part of the file's name: files of other formats are not read."""


class ProgressLog:
    """A JSON-lines file with one entry per finished piece of work.

    The file is named after a hash of the plan, so runs with other plans use other files. Each line
    has a checksum. A damaged line, such as the last one of a killed process, is dropped together
    with all later lines.
    """

    def __init__(
        self, folder: Path, plan: Mapping[str, Any], restore: Callable[[Any], None], *, advice: str = ""
    ) -> None:
        """Open the log of a plan, and pass every entry of an earlier run to `restore`.

        Args:
            folder: folder of the file; it is created if necessary.
            plan: everything that the results depend on, as plain values.
            restore: called with each entry, whether it was read or has just been appended. It
                raises DataError if an entry is already finished or not part of the plan.
            advice: further advice for the error message if another process runs the same plan.

        Raises:
            OutputError: the folder cannot be written, or another process runs the same plan.
            DataError: the file has an entry that `restore` rejects.
        """
        text = _FORMAT + json.dumps(plan, sort_keys=True)
        self.path = output_dir(folder) / f".unfinished-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        self._restore = restore
        try:
            self._file = self.path.open("a+b", buffering=0)
            self._lock(advice)
            self._file.truncate(self._read())
        except DataError:
            self._file.close()
            raise
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
        lines = self._file.readlines()
        for number, line in enumerate(lines, 1):
            content = _decode(line)
            if content is None:
                log.warning("%s: dropped %d damaged or incomplete lines", self.path, len(lines) - number + 1)
                break
            try:
                self._restore(json.loads(content))
            except DataError as error:
                raise self._refused(number, error) from error
            except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
                raise self._refused(number, DataError("the entry has another format")) from error
            valid += len(line)
        return valid

    def _refused(self, number: int, error: DataError) -> DataError:
        return DataError(
            f"{self.path}, line {number}: {error}; two processes may have written to this file",
            fix=f"run the command again after: rm {self.path}",
        )

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write an entry to disk and pass it to `restore`.

        Raises:
            OutputError: the file cannot be written.
        """
        line = _encode(json.dumps(entry, separators=(",", ":")))
        try:
            if self._file.write(line) != len(line):  # the next call would fail; the part is dropped when it is read
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror or error}. The finished work is kept",
                fix="free some space, and run the same command to resume",
            ) from error
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


def _encode(content: str) -> bytes:
    """Return a line: the checksum of the content, a space, and the content."""
    data = content.encode()
    return b"%08x %s\n" % (zlib.crc32(data), data)


def _decode(line: bytes) -> bytes | None:
    """Return the content of a line, or None if the line is damaged."""
    checksum, _, content = line.removesuffix(b"\n").partition(b" ")
    is_valid = line.endswith(b"\n") and checksum == b"%08x" % zlib.crc32(content)
    return content if is_valid else None
