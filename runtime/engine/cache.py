"""Engines of earlier builds, kept by everything that decides what an engine is.

An entry is `KEY.engine` and its sidecar, as a build writes them, in `cache_folder("engines")`. The sidecar is written
last and removed first, so that an entry with one is whole. Where the file system can, a plan is one file under two
names, here and where it was built: no bytes move. Who writes into one changes the other, which its hash then tells.
Whatever fails here costs a build, never the result.
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
from runtime.system.cache import entries, limit_bytes, prune, remove_leftovers
from runtime.system.files import cache_folder, link_or_copy
from runtime.system.locks import file_lock

__all__ = ["EngineCache", "engine_key"]

log = logging.getLogger(__name__)

_FORMAT = 1
_PATIENCE_S = 1800.0
"""How long to wait for another process that builds the same engine, before building it here too."""
_KEYED = (
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
"""The fields of `EngineInfo` that decide which engine it is."""


def engine_key(info: EngineInfo) -> str:
    """Returns the hexadecimal SHA-256 of all that decides which engine `info` describes; its own bytes do not count."""
    import platform

    fields = {name: getattr(info, name) for name in _KEYED}
    system = (platform.system(), platform.machine())  # a plan loads on its own system only
    return hashlib.sha256(json.dumps([_FORMAT, system, fields], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCache:
    """A folder of engines, of bounded size, that several processes may use at once."""

    folder: Path
    """Where they are; it is made when the first is kept."""
    limit: int
    """Bytes it may grow to; what was used longest ago goes first. 0 turns the cache off."""
    patience_s: float = _PATIENCE_S
    """How long to wait for another process that builds the same engine."""

    @classmethod
    def default(cls) -> EngineCache:
        """The user's, as `ADVPROP_CACHE` and `ADVPROP_CACHE_GB` say."""
        return cls(folder=cache_folder("engines"), limit=limit_bytes())

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[None]:
        """Keeps other processes from building the same engine meanwhile; waits for one that does."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # plans hold native code: nobody else's business
        except OSError as error:
            log.debug("no lock: %s", error)  # `store` tells
        with file_lock(self.folder / f"{key}.lock", patience_s=self.patience_s, waiting=_tell):
            yield

    def fetch(self, wanted: EngineInfo, target: Path) -> EngineInfo | None:
        """Puts an engine and its sidecar at `target`, if there is one whose bytes are still those of their hash.

        Args:
            wanted: what it must be, its `plan_sha256` and `layers` aside.
            target: the engine's file.

        Returns:
            What its sidecar says; None where there is none, or it was damaged, which is told and removed.

        Raises:
            OutputError: `target` cannot be written.
        """
        key = engine_key(wanted)
        engine = self.folder / f"{key}.engine"
        if self.limit == 0 or not sidecar_path(engine).is_file():
            return None
        try:
            info = read_sidecar(engine)
            if engine_key(info) != key:
                raise ModelFileError(f"{engine} is another engine than its name says")
            os.utime(sidecar_path(engine))
        except (ModelFileError, SpecError) as error:
            log.warning("a cached engine is damaged and built anew: %s", str(error).split("; build it again")[0])
            self._forget(engine)
            return None
        except OSError as error:
            log.warning("a cached engine cannot be read and is built anew: %s", error)
            return None
        try:
            put_engine(target, info, lambda: link_or_copy(engine, target))
        except FileNotFoundError:  # removed meanwhile, by a process that made room
            return None
        return info

    def store(self, info: EngineInfo, built: Path) -> None:
        """Keeps the engine at `built`, and removes what was used longest ago where that is too much. Never raises."""
        try:
            size = built.stat().st_size
        except OSError as error:
            log.warning("the engine is built, but could not be kept in the cache: %s", error)
            return
        if size > self.limit:
            log.info("the engine is larger than the cache may be; not kept (ADVPROP_CACHE_GB)")
            return
        engine = self.folder / f"{engine_key(info)}.engine"
        try:
            remove_leftovers(self.folder)
            # Room first: a disk that is nearly full must not be filled by what goes anyway.
            prune(entries(self.folder), self.limit - size)
            put_engine(engine, info, lambda: link_or_copy(built, engine))
        except OSError as error:  # OutputError is one
            log.warning("the engine is built, but could not be kept in the cache: %s", error)
            self._forget(engine)

    def _forget(self, engine: Path) -> None:
        for file in (sidecar_path(engine), engine):
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)


def _tell() -> None:
    log.info("another process is building the same engine; waiting for it")
