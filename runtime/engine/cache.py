"""`EngineCache`, which keeps built engines under a key of everything that determines an engine.

An entry is `KEY.engine` and its sidecar in `cache_folder("engines")`. The sidecar is written last
and removed first, so every entry with a sidecar is complete. If the file system allows it, the plan
in the cache and the plan at its destination are hard links to the same file, and no bytes are
copied. A change to one then changes the other; the hash in the sidecar detects it. A failure of the
cache costs a build, but never affects the result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.engine.sidecar import EngineInfo, put_engine, read_sidecar, sidecar_path
from runtime.errors import ModelFileError, SpecError
from runtime.system.cache import entries, limit_bytes, private_folder, prune, remove_leftovers
from runtime.system.files import link_or_copy
from runtime.system.locks import file_lock

__all__ = ["EngineCache", "engine_key"]

log = logging.getLogger(__name__)

_FORMAT = 1
_KEY_FIELDS = (
    "onnx_sha256",
    "precision",
    "calibration_sha256",
    "profiles",
    "flavor",
    "version",
    "compute_capabilities",
    "gpu",
    "flags",
)
"""The fields of `EngineInfo` that determine an engine."""


def engine_key(info: EngineInfo) -> str:
    """Return the hexadecimal SHA-256 of everything that determines an engine."""
    import platform

    fields = {name: getattr(info, name) for name in _KEY_FIELDS}
    system = (platform.system(), platform.machine())  # a plan loads on this system only
    return hashlib.sha256(json.dumps([_FORMAT, system, fields], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCache:
    """A folder of engines with a limited size. Several processes may use it at once."""

    folder: Path
    """The folder, which is created when it is first needed."""
    max_bytes: int
    """Maximum size, in bytes. The least recently used engines are removed first. 0 disables the
    cache."""
    lock_timeout_s: float = 1800.0
    """Maximum time to wait for another process that builds the same engine, in seconds."""

    @classmethod
    def default(cls) -> EngineCache | None:
        """Return the user's cache, with the settings `ADVPROP_CACHE` and `ADVPROP_CACHE_GB`.

        None, with a warning, if it cannot be created, or other users could write to it.
        """
        folder = private_folder("engines")
        return None if folder is None else cls(folder=folder, max_bytes=limit_bytes())

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Keep other processes from building the same engine. Wait for a process that builds it."""
        try:
            # The folder is private, because plans contain native code.
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            log.debug("no lock: %s", error)  # `store` logs a warning
        with file_lock(self.folder / f"{key}.lock", timeout_s=self.lock_timeout_s, on_wait=_log_wait):
            yield

    def fetch(self, requested: EngineInfo, target: Path) -> EngineInfo | None:
        """Copy the cached engine and its sidecar to `target`, if it exists and its hash is correct.

        Args:
            requested: the requested engine; its `plan_sha256` and `layers` are ignored.
            target: path of the engine.

        Returns:
            The sidecar, or None if there is no such engine or it is damaged. A damaged one is
            logged and removed.

        Raises:
            OutputError: `target` cannot be written.
        """
        key = engine_key(requested)
        engine = self.folder / f"{key}.engine"
        if self.max_bytes == 0 or not sidecar_path(engine).is_file():
            return None
        try:
            info = read_sidecar(engine)
            if engine_key(info) != key:
                raise ModelFileError(f"{engine} does not match its name")
            os.utime(sidecar_path(engine))
        except (ModelFileError, SpecError) as error:
            log.warning("a cached engine is damaged and will be rebuilt: %s", error.message)
            self._remove(engine)
            return None
        except OSError as error:
            log.warning("a cached engine cannot be read and will be rebuilt: %s", error)
            return None
        try:
            put_engine(target, info, lambda: link_or_copy(engine, target))
        except FileNotFoundError:  # another process has just removed it to free space
            return None
        return info

    def store(self, info: EngineInfo, built: Path) -> None:
        """Add the engine at `built`, and remove the least recently used ones. Never raises."""
        try:
            size = built.stat().st_size
        except OSError as error:
            log.warning("the engine was built, but could not be cached: %s", error)
            return
        if size > self.max_bytes:
            log.info("the engine is larger than the cache and was not cached (ADVPROP_CACHE_GB)")
            return
        engine = self.folder / f"{engine_key(info)}.engine"
        try:
            remove_leftovers(self.folder)
            # Free the space first: the disk may be nearly full.
            prune(entries(self.folder), self.max_bytes - size)
            put_engine(engine, info, lambda: link_or_copy(built, engine))
        except OSError as error:  # includes OutputError
            log.warning("the engine was built, but could not be cached: %s", error)
            self._remove(engine)

    def _remove(self, engine: Path) -> None:
        for file in (sidecar_path(engine), engine):
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)


def _log_wait() -> None:
    log.info("waiting for another process that is building the same engine")
