"""Writing files so that none is ever half-written, and naming them by content."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from runtime.errors import OutputError

__all__ = [
    "atomic_folder",
    "atomic_write",
    "cache_folder",
    "link_or_copy",
    "output_dir",
    "sha256_file",
    "write_bytes",
    "write_text",
]

_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EACCES: "no permission to write there: choose another place",
    errno.EPERM: "no permission to write there: choose another place",
    errno.EROFS: "the file system is read-only: choose another place",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another place",
    errno.EEXIST: "a file of that name is in the way: choose another place",
    errno.EISDIR: "a folder of that name is in the way: choose another place",
}


def _output_error(path: Path, error: OSError) -> OutputError:
    advice = _ADVICE.get(error.errno or 0, "choose another place")
    return OutputError(f"cannot write {path}: {error.strerror or error}; {advice}")


def output_dir(path: Path) -> Path:
    """Makes the folder `path` and proves that a file can be written in it.

    Called before long work starts, so that it does not end in a failed write.

    Raises:
        OutputError: the folder cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise _output_error(path, error) from error
    return path


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Opens a binary file that replaces `path` only once it is whole and on disk.

    The bytes go to a temporary file in the same folder, which is flushed, fsynced and
    renamed over `path`. On any failure the temporary file is removed and `path` is
    left as it was.

    Raises:
        OutputError: the folder is not writable, or the disk is full.
    """
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise _output_error(path, error) from error
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OutputError:
        raise
    except OSError as error:
        raise _output_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Gives a new folder whose files move into `path` only once all are whole and on disk.

    They move in the reverse order of their names, so that `m.onnx` comes after the `m.onnx.data` it needs.

    Raises:
        OutputError: `path` is not writable, or the disk is full.
    """
    try:
        with tempfile.TemporaryDirectory(dir=path, prefix=".unfinished-") as name:
            folder = Path(name)
            yield folder
            files = sorted(folder.iterdir(), reverse=True)
            for file in files:
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            for file in files:
                os.replace(file, path / file.name)
            _sync_folder(path)
    except OSError as error:
        raise _output_error(path, error) from error


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Writes `content` to `path` atomically. Raises OutputError."""
    with atomic_write(path) as file:
        file.write(content)


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`, atomically; a copy where a file system cannot have it under two names.

    Nothing here writes into a file that has its name, so that a link is as good as a copy, and no bytes move.

    Raises:
        FileNotFoundError: there is no `source`.
        OutputError: the folder is not writable, or the disk is full.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        os.link(source, temporary)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        with source.open("rb") as file, atomic_write(target) as copy:
            shutil.copyfileobj(file, copy, 2**20)
        return
    try:
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise _output_error(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)  # where the two were one file already, replacing does nothing


def write_text(path: Path, content: str) -> None:
    """Writes `content` to `path` atomically, as UTF-8. Raises OutputError."""
    write_bytes(path, content.encode())


def cache_folder(kind: str) -> Path:
    """Returns the folder of one kind of cached file, below `ADVPROP_CACHE` or `~/.cache/advprop`; it need not exist."""
    base = os.environ.get("ADVPROP_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "advprop"
    return Path(base).expanduser() / kind


def sha256_file(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of the file at `path`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
