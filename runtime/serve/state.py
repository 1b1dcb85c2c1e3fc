"""`ServerState`, what HTTP and gRPC share: the settings, the models, the metrics and the life cycle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from runtime.serve.config import ServeConfig
from runtime.serve.errors import Outcome, RequestError
from runtime.serve.metrics import Metrics
from runtime.serve.models import Registry

__all__ = ["EXTENSIONS", "ServerState"]

EXTENSIONS = ("binary_tensor_data", "classification", "model_repository", "parameters")
"""Extensions of the protocol that the server announces."""
_BODIES = 16
"""Largest bodies that may be in memory at the same time."""


@dataclass(slots=True, kw_only=True)
class ServerState:
    """State of one server process. Only its event loop changes it."""

    config: ServeConfig
    registry: Registry
    metrics: Metrics
    worker: int = 0
    """Index of the process, if there are several."""
    is_loaded: bool = False
    """Whether all models were loaded once."""
    is_draining: bool = False
    """Whether the server is stopping."""
    body_bytes: int = 0
    """Memory of all bodies of requests in flight."""

    @property
    def is_ready(self) -> bool:
        """Whether the server should receive requests."""
        return self.is_loaded and not self.is_draining

    def check_loaded(self) -> None:
        """Raise RequestError until all models are loaded."""
        if not self.is_loaded:
            raise RequestError(Outcome.NOT_READY, "the server is loading its models; try again later")

    @contextmanager
    def memory_for(self, size: int) -> Iterator[None]:
        """Reserve memory for a body.

        Raises:
            RequestError: the bodies of other requests occupy it.
        """
        limit = _BODIES * self.config.max_body_bytes
        if self.body_bytes + size > limit:
            raise RequestError(
                Outcome.OVERLOADED, f"requests in flight have bodies of {self.body_bytes} of at most {limit} bytes"
            )
        self.body_bytes += size
        try:
            yield
        finally:
            self.body_bytes -= size
