"""Settings of a server, and the models that it serves."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from runtime.backends.options import EngineOptions, Threads
from runtime.batching.batcher import Batching
from runtime.errors import ConfigError, ModelFileError
from runtime.system.decode import MAX_PIXELS

__all__ = ["LoadSettings", "ModelSource", "ServeConfig"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's name, and where its files are."""

    name: str
    """Name in requests: letters, digits, `_`, `-` and `.`."""
    path: Path
    """A model file, a folder that `advprop export` wrote, or a folder of numbered versions."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"a model's name consists of letters, digits, '_', '-' and '.'; found {self.name!r}",
                fix=f"name it: NAME={self.path}",
            )

    @classmethod
    def parse(cls, text: str) -> ModelSource:
        """Parse `NAME=FILE` or `FILE`, whose name is that of the file without its last suffix.

        Raises:
            ConfigError: the name has other characters than a model's name may have.
        """
        name, equals, path = text.partition("=")
        if equals and _NAME.fullmatch(name):
            return cls(name, Path(path))
        file = Path(text)
        return cls(file.name if file.is_dir() else file.stem, file)

    def versions(self) -> dict[str, Path]:
        """Return the model's versions, ascending, and the file or folder of each.

        The subfolders of a folder of versions are numbers from 1. Other sources have the version 1.

        Raises:
            ModelFileError: the file or folder does not exist.
        """
        if not self.path.exists():
            raise ModelFileError(f"the model {self.name!r} has no file: {self.path} does not exist")
        if not self.path.is_dir():
            return {"1": self.path}
        numbers = sorted(
            int(child.name)
            for child in self.path.iterdir()
            if child.is_dir() and re.fullmatch(r"[1-9][0-9]{0,17}", child.name)
        )
        return {str(number): self.path / str(number) for number in numbers} or {"1": self.path}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """How model files are loaded; see `runtime.load`."""

    backend: str = "auto"
    device: str = "auto"
    threads: Threads = field(default_factory=Threads)
    batching: Batching = field(default_factory=Batching)
    engine: EngineOptions = field(default_factory=EngineOptions)
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Settings of a server."""

    models: tuple[ModelSource, ...]
    """The models. Their names differ."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    http_port: int = 8000
    """TCP port of HTTP; 0 lets the system choose."""
    grpc_port: int | None = None
    """TCP port of gRPC; 0 lets the system choose, None turns gRPC off."""
    load: LoadSettings = field(default_factory=LoadSettings)
    """How the models are loaded."""
    drain_s: float = 30.0
    """Seconds that requests in flight have to complete after SIGTERM."""
    watch_s: float = 0.0
    """Seconds between two checks for changed model files; 0 turns the checks off."""
    workers: int = 1
    """Processes. Each loads all models."""
    timeout_s: float = 60.0
    """Seconds until a request fails that sets no `timeout`."""
    max_body_bytes: int = 64 * 2**20
    """Maximum size of a request's body."""
    max_header_bytes: int = 64 * 2**10
    """Maximum size of a request's line and headers."""
    receive_s: float = 30.0
    """Seconds in which a client must send its headers, and seconds without progress of a body."""
    access_log: bool = False
    """Print one JSON object per request."""

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        if not names:
            raise ConfigError("no models to serve", fix="pass at least one file: advprop serve model.onnx")
        for name in names:
            if names.count(name) > 1:
                paths = ", ".join(str(model.path) for model in self.models if model.name == name)
                raise ConfigError(f"several models are named {name!r}: {paths}", fix="name them: NAME=FILE")
        for field_name, smallest in (
            ("workers", 1),
            ("drain_s", 0),
            ("watch_s", 0),
            ("max_body_bytes", 1),
            ("max_header_bytes", 1),
        ):
            if getattr(self, field_name) < smallest:
                raise ConfigError(f"{field_name} must be at least {smallest}; found {getattr(self, field_name)}")
        for field_name in ("timeout_s", "receive_s"):
            if not getattr(self, field_name) > 0:
                raise ConfigError(f"{field_name} must be above 0; found {getattr(self, field_name)}")

    @property
    def is_local(self) -> bool:
        """Whether only programs on this machine can connect."""
        return self.host in _LOOPBACK
