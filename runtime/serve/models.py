"""`Registry`, the models that a server has loaded, and how they are loaded, replaced and unloaded."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from runtime.backends.open import warm_up
from runtime.errors import AdvPropError, ModelFileError, nearest
from runtime.loading import load
from runtime.serve.config import LoadSettings, ModelSource
from runtime.serve.errors import Outcome, RequestError
from runtime.session import Session

__all__ = ["Registry", "ServedModel", "VersionState"]

log = logging.getLogger(__name__)

_Signature: TypeAlias = tuple[tuple[str, int, int, int], ...]
_MAX_FILES = 10_000


@dataclass(frozen=True, slots=True, eq=False)
class ServedModel:
    """A loaded version of a model."""

    name: str
    version: str
    session: Session
    path: Path
    """The model file, or the folder that it was chosen from."""


@dataclass(frozen=True, slots=True)
class VersionState:
    """A version of a model, for the index of the repository."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


@dataclass(slots=True)
class _Entry:
    """The versions of one model."""

    source: ModelSource
    loaded: dict[str, ServedModel] = field(default_factory=dict)
    """Version → model, in ascending order of versions."""
    signatures: dict[str, _Signature] = field(default_factory=dict)
    """Version → the state of its files when they were last loaded, also if that failed."""
    seen: dict[str, _Signature] = field(default_factory=dict)
    """Version → the state of its files in the previous check for changes."""
    errors: dict[str, str] = field(default_factory=dict)
    """Version → why its files could not be loaded."""
    unloaded: bool = False
    """Whether a client unloaded the model. Changed files do not load it again."""


class Registry:
    """The models of a server. Thread-safe.

    Requests of a version that is replaced finish on the session that accepted them. Files that
    cannot be loaded leave the loaded version in service.
    """

    def __init__(self, sources: Sequence[ModelSource], settings: LoadSettings) -> None:
        """Create a registry of models that are not loaded yet."""
        self._settings = settings
        self._entries = {source.name: _Entry(source) for source in sources}
        self._loading = threading.Lock()
        """Held while files are loaded."""
        self._closing: set[threading.Thread] = set()
        self.failed_loads: dict[str, int] = dict.fromkeys(self._entries, 0)
        """Model → loads that failed."""

    @property
    def names(self) -> list[str]:
        """The names of all models, loaded or not."""
        return list(self._entries)

    @property
    def default_name(self) -> str:
        """The name of the only model.

        Raises:
            RequestError: there are several models.
        """
        if len(self._entries) == 1:
            return next(iter(self._entries))
        raise RequestError(Outcome.INVALID, f"which model? Add ?model=NAME, one of {', '.join(self._entries)}")

    def loaded(self) -> Iterator[ServedModel]:
        """Yield all loaded versions of all models."""
        for entry in self._entries.values():
            yield from list(entry.loaded.values())

    def versions(self, name: str) -> list[str]:
        """Return the loaded versions of a model.

        Raises:
            RequestError: there is no such model.
        """
        return list(self._entry(name).loaded)

    def get(self, name: str, version: str = "") -> ServedModel:
        """Return a loaded version of a model; the highest one if `version` is empty.

        Raises:
            RequestError: there is no such model or version, or it is not loaded.
        """
        loaded = self._entry(name).loaded
        if version:
            if version in loaded:
                return loaded[version]
            found = ", ".join(loaded) or "none"
            raise RequestError(
                Outcome.NOT_FOUND, f"the model {name!r} has no version {version!r}; loaded versions: {found}"
            )
        if not loaded:
            raise RequestError(
                Outcome.NOT_READY, f"the model {name!r} is not loaded; POST /v2/repository/models/{name}/load loads it"
            )
        return next(reversed(loaded.values()))

    def is_ready(self, name: str, version: str = "") -> bool:
        """Return whether a version, or any version if it is empty, is loaded.

        Raises:
            RequestError: there is no such model.
        """
        loaded = self._entry(name).loaded
        return version in loaded if version else bool(loaded)

    def index(self) -> list[VersionState]:
        """Return the state of every version that is loaded or could not be loaded."""
        states = []
        for name, entry in self._entries.items():
            loaded, errors = dict(entry.loaded), dict(entry.errors)
            for version in sorted({*loaded, *errors}, key=int):
                state: Literal["READY", "UNAVAILABLE"] = "READY" if version in loaded else "UNAVAILABLE"
                states.append(VersionState(name, version, state, errors.get(version, "")))
            if not loaded and not errors:
                states.append(VersionState(name, "", "UNAVAILABLE", "unloaded" if entry.unloaded else "not loaded"))
        return states

    def load_all(self) -> None:
        """Load all versions of all models.

        Raises:
            AdvPropError: a file cannot be loaded.
        """
        for name in self._entries:
            self.load(name)

    def load(self, name: str) -> None:
        """Load the files of a model, and replace its loaded versions once the new ones are warm.

        Raises:
            RequestError: there is no such model.
            AdvPropError: a file cannot be loaded. Its loaded version stays in service.
        """
        entry = self._entry(name)
        with self._loading:
            entry.unloaded = False
            versions = entry.source.versions()
            gone = [version for version in entry.loaded if version not in versions]
            failures = [error for error in self._update(entry, versions, gone) if error]
        if failures:
            raise failures[0]

    def unload(self, name: str) -> None:
        """Unload a model. Requests in flight complete first.

        Raises:
            RequestError: there is no such model.
        """
        entry = self._entry(name)
        with self._loading:
            entry.unloaded = True
            leaving, entry.loaded = entry.loaded, {}
            entry.errors = {}
        self._retire(leaving.values())

    def reload_changed(self) -> None:
        """Load versions that are new or changed, and unload versions whose folder is gone.

        Files count as changed when they differ from the loaded ones, and are equal in two calls in
        succession: a file that is being written is not loaded. Errors are logged, and the files
        are tried again once they change.
        """
        for entry in self._entries.values():
            with self._loading:
                if not entry.unloaded:
                    self._reload(entry)

    def close(self, *, drain: bool = True) -> None:
        """Unload all models, and wait until their sessions are closed."""
        for name, entry in self._entries.items():
            if drain:
                self.unload(name)
            else:
                for model in entry.loaded.values():
                    model.session.close(drain=False)
        for thread in list(self._closing):
            thread.join()

    def _entry(self, name: str) -> _Entry:
        if name in self._entries:
            return self._entries[name]
        hint = nearest(name, self._entries) or f"models: {', '.join(self._entries)}"
        raise RequestError(Outcome.NOT_FOUND, f"there is no model {name[:100]!r}; {hint}")

    def _reload(self, entry: _Entry) -> None:
        try:
            versions = entry.source.versions()
        except ModelFileError:  # such as between deleting a file and writing its successor
            return
        seen, entry.seen = entry.seen, {version: _signature(path) for version, path in versions.items()}
        changed = {
            version: path
            for version, path in versions.items()
            if entry.seen[version] and entry.seen[version] == seen.get(version) != entry.signatures.get(version)
        }
        gone = [version for version in entry.loaded if version not in versions]
        if changed or gone:
            for error in self._update(entry, changed, gone):
                if error:
                    log.error("cannot load a changed model, the loaded one stays in service: %s", error)

    def _update(
        self, entry: _Entry, versions: dict[str, Path], gone: Sequence[str] = ()
    ) -> Iterator[AdvPropError | None]:
        """Load versions one by one; yield the error of each. Each replaces its predecessor at once."""
        for version, path in versions.items():
            entry.signatures[version] = _signature(path)
            try:
                model = ServedModel(entry.source.name, version, _load_warm(path, self._settings), path)
            except AdvPropError as error:
                entry.errors[version] = str(error)
                self.failed_loads[entry.source.name] += 1
                yield error
                continue
            entry.errors.pop(version, None)
            leaving = entry.loaded.get(version)
            loaded = {**entry.loaded, version: model}
            entry.loaded = {key: loaded[key] for key in sorted(loaded, key=int)}
            log.info("loaded %s version %s: %s", entry.source.name, version, model.session.explain().splitlines()[0])
            if leaving:
                self._retire([leaving])
            yield None
        if gone:
            leaving_models = [entry.loaded[version] for version in gone]
            entry.loaded = {key: model for key, model in entry.loaded.items() if key not in gone}
            log.info("unloaded %s version %s", entry.source.name, ", ".join(gone))
            self._retire(leaving_models)

    def _retire(self, models: Iterable[ServedModel]) -> None:
        """Close sessions once their requests have completed, without waiting for them."""
        sessions = [model.session for model in models]

        def close() -> None:
            for session in sessions:
                session.close()
            self._closing.discard(threading.current_thread())

        thread = threading.Thread(target=close, name="advprop-unload")
        self._closing.add(thread)
        thread.start()


def _load_warm(path: Path, settings: LoadSettings) -> Session:
    """Load a file, and run everything once that the first request would otherwise wait for."""
    session = load(
        path,
        backend=settings.backend,
        device=settings.device,
        threads=settings.threads,
        batching=settings.batching,
        engine=settings.engine,
        max_pixels=settings.max_pixels,
    )
    try:
        backend = session.backend
        if backend.spec is not None:
            image = np.zeros((8, 8, 3), np.uint8)
            session.submit_predict([_png(image)]).result()
        if backend.spec is None and -1 in backend.input.shape[1:]:
            log.warning("%s has no spec and accepts any image size, so it is not warmed up", path)
        else:
            warm_up(backend, sorted({1, session.batching.max_batch}), path)
    except BaseException:
        session.close(drain=False)
        raise
    return session


def _png(image_HWC: NDArray[np.uint8]) -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, "PNG")
    return file.getvalue()


def _signature(path: Path) -> _Signature:
    """Return names, times and sizes of a model's files; empty while they cannot be read.

    The files of a model file are those whose names begin with its own name or stem: the sidecar of
    an engine, and weights outside an ONNX file.
    """
    try:
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*"))[:_MAX_FILES] if file.is_file()]
        else:
            files = sorted(file for file in path.parent.glob("*") if file.name.startswith(path.stem) and file.is_file())
        stats = [(file, file.stat()) for file in files]
    except OSError:
        return ()
    return tuple((str(file), stat.st_mtime_ns, stat.st_size, stat.st_ino) for file, stat in stats)
