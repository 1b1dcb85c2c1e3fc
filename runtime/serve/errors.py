"""`RequestError`, an answer to a request that fails, and the answers to advprop's errors."""

from __future__ import annotations

import logging
from enum import Enum

from runtime.errors import (
    AdvPropError,
    DataError,
    DeadlineExceeded,
    InputError,
    QueueFull,
    RequestNotServed,
    SessionClosed,
    SpecError,
)

__all__ = ["Outcome", "RequestError", "request_error"]

log = logging.getLogger(__name__)

_NO_SPEC = (
    "the model's file describes neither its preprocessing nor its classes, so it accepts no encoded images; "
    "send preprocessed tensors to /v2/models/NAME/infer"
)


class Outcome(Enum):
    """How a request ends: the label in the metrics, the HTTP status and the gRPC status."""

    OK = ("ok", 200, "OK")
    INVALID = ("invalid", 400, "INVALID_ARGUMENT")
    NOT_FOUND = ("not_found", 404, "NOT_FOUND")
    WRONG_METHOD = ("wrong_method", 405, "UNIMPLEMENTED")
    SLOW_CLIENT = ("slow_client", 408, "CANCELLED")
    TOO_LARGE = ("too_large", 413, "RESOURCE_EXHAUSTED")
    WRONG_MEDIA = ("wrong_media", 415, "INVALID_ARGUMENT")
    UNPROCESSABLE = ("unprocessable", 422, "INVALID_ARGUMENT")
    CANCELLED = ("cancelled", 499, "CANCELLED")
    FAILED = ("failed", 500, "INTERNAL")
    UNSUPPORTED = ("unsupported", 501, "UNIMPLEMENTED")
    OVERLOADED = ("overloaded", 503, "RESOURCE_EXHAUSTED")
    LATE = ("late", 503, "DEADLINE_EXCEEDED")
    NOT_READY = ("not_ready", 503, "UNAVAILABLE")

    def __init__(self, label: str, http_status: int, grpc_status: str) -> None:
        self.label = label
        self.http_status = http_status
        self.grpc_status = grpc_status


class RequestError(Exception):
    """A request fails. The message goes to the client."""

    def __init__(self, outcome: Outcome, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome
        self.message = message


def request_error(error: Exception) -> RequestError:
    """Return the answer to an error. Unexpected errors are logged, and their text stays here."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, SpecError):  # its text has the path, and advice for the operator
        return RequestError(Outcome.UNPROCESSABLE, _NO_SPEC)
    if isinstance(error, AdvPropError):
        return RequestError(_outcome(error), str(error))
    log.error("a request failed", exc_info=error)
    return RequestError(Outcome.FAILED, "internal error; the log of the server has the details")


def _outcome(error: AdvPropError) -> Outcome:
    for kind, outcome in (
        (QueueFull, Outcome.OVERLOADED),
        (DeadlineExceeded, Outcome.LATE),
        (RequestNotServed, Outcome.OVERLOADED),
        (SessionClosed, Outcome.NOT_READY),
        (DataError, Outcome.UNPROCESSABLE),
        (InputError, Outcome.INVALID),
    ):
        if isinstance(error, kind):
            return outcome
    return Outcome.FAILED
