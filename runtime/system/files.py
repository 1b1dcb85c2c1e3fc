"""Atomic file writes, content hashes, and the cache folder."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shlex
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
    "is_url",
    "link_or_copy",
    "no_such",
    "output_dir",
    "sha256_file",
    "write_bytes",
    "write_text",
]

_ELSEWHERE = "choose another location"
_FIXES = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EACCES: f"permission denied: {_ELSEWHERE}",
    errno.EPERM: f"permission denied: {_ELSEWHERE}",
    errno.EROFS: f"the file system is read-only: {_ELSEWHERE}",
    errno.ENOTDIR: f"a part of the path is a file, not a folder: {_ELSEWHERE}",
    errno.EEXIST: f"a file with that name exists: {_ELSEWHERE}",
    errno.EISDIR: f"a folder with that name exists: {_ELSEWHERE}",
}


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a URL, also one that `Path` has shortened to one slash."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(path)) is not None


def no_such(kind: str, path: str | os.PathLike[str]) -> str:
    """Return the message for a missing file or folder, which explains what to do about a URL.

    Args:
        kind: what was expected, such as "image file".
        path: path that does not exist.
    """
    if not is_url(path):
        return f"no such {kind}: {path}"
    url = re.sub(":/+", "://", os.fspath(path), count=1)
    is_web = url.lower().startswith(("http://", "https://"))
    fix = f"download it first: curl -LO {shlex.quote(url)}" if is_web else "copy it to this machine first"
    return f"{url} is a URL; expected a local {kind}, {fix}"


def _output_error(path: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {path}: {error.strerror or error}", fix=_FIXES.get(error.errno or 0, _ELSEWHERE))


def output_dir(path: Path) -> Path:
    """Create the folder `path`, check that it is writable, and return it.

    Call it before long work, whose results would otherwise be lost.

    Raises:
        OutputError: the folder cannot be created or written.
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
    """Open a binary file that replaces `path` once it is complete and on disk.

    The bytes go to a temporary file in the same folder, which is flushed, fsynced and renamed to
    `path`. On failure the temporary file is removed and `path` stays unchanged.

    Raises:
        OutputError: the folder is not writable, or the disk is full.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        # The permissions follow the umask. To read and restore it, as with tempfile's permissions,
        # would give everyone access to files that other threads create in that moment.
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise _output_error(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
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
    """Yield a temporary folder whose files move into `path` once all of them are on disk.

    They move in reverse order of their names: `m.onnx` after the `m.onnx.data` that it needs.

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
    """Write `content` to `path` atomically.

    Raises:
        OutputError: the folder is not writable, or the disk is full.
    """
    with atomic_write(path) as file:
        file.write(content)


def write_text(path: Path, content: str) -> None:
    """Write `content` to `path` atomically, as UTF-8.

    Raises:
        OutputError: the folder is not writable, or the disk is full.
    """
    write_bytes(path, content.encode())


def link_or_copy(source: Path, target: Path) -> None:
    """Atomically make `target` a hard link to `source`, or a copy if a link is not possible.

    advprop replaces files and never modifies them, so a link is as good as a copy.

    Raises:
        FileNotFoundError: `source` does not exist.
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
        temporary.unlink(missing_ok=True)  # `replace` ignores links to the same file


def cache_folder(kind: str) -> Path:
    """Return the folder for one kind of cached file, which may not exist yet.

    It is below `ADVPROP_CACHE`, or below the user's cache folder if that is not set:
    `$XDG_CACHE_HOME/advprop` or `~/.cache/advprop` on Linux.
    """
    base = os.environ.get("ADVPROP_CACHE")
    if not base:
        from platformdirs import user_cache_dir

        base = user_cache_dir("advprop", appauthor=False)
    return Path(base).expanduser() / kind


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of the file at `path`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
