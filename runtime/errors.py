"""The errors that advprop raises on purpose.

    AdvPropError                      exit code 1
    ├── InputError (ValueError)       2  the input is invalid
    │   ├── ArchError                    an unknown or unsuitable architecture
    │   ├── ConfigError                  an invalid option or configuration field
    │   ├── DataError                    an image folder or image file that cannot be used
    │   ├── CheckpointError              a foreign, truncated or unsafe checkpoint
    │   ├── ModelFileError               an ONNX file, engine or sidecar that cannot be used
    │   ├── SessionClosed                the session was closed before the request ran
    │   └── SpecError                    a missing or invalid model spec
    ├── OutputError (OSError)         2  the output cannot be written
    ├── BackendUnavailable            3  a library, driver or GPU is missing
    ├── EngineBuildError              3  the engine builder rejected the graph
    ├── RunFailed                     3  the backend failed while it ran the model
    ├── VerificationError             4  a stage disagrees with the previous stage
    ├── TrainingDiverged              5  the loss or the weights are not finite
    ├── GateFailed                    5  a condition of `advprop compare --fail-if` holds
    ├── AdaptationRefused             5  an adapted model is not expected to be better
    ├── RequestNotServed              6  the server is overloaded; retry the request later
    │   ├── QueueFull                    the queue has no room for the request
    │   └── DeadlineExceeded             the deadline passed before the result was ready
    └── Interrupted                 130  stopped by Ctrl-C (SIGTERM: 143); progress is saved

A message states what was found, what was expected, and how to fix it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AdaptationRefused",
    "AdvPropError",
    "ArchError",
    "BackendUnavailable",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeadlineExceeded",
    "EngineBuildError",
    "GateFailed",
    "InputError",
    "Interrupted",
    "ModelFileError",
    "OutputError",
    "QueueFull",
    "RequestNotServed",
    "RunFailed",
    "SessionClosed",
    "SpecError",
    "TrainingDiverged",
    "VerificationError",
    "first_line",
    "nearest",
]


class AdvPropError(Exception):
    """Base class of all errors that advprop raises on purpose.

    Attributes:
        message: what is wrong, without the fix.
        fix: how to fix it, often a command; empty if there is no general advice.
        exit_code: the exit code of a command that ends with this error.
    """

    exit_code = 1

    def __init__(self, message: str = "", *, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}; {self.fix}" if self.fix else self.message


class InputError(AdvPropError, ValueError):
    """The input is invalid."""

    exit_code = 2


class ArchError(InputError):
    """The architecture is unknown to timm, or the recipe cannot train it."""


class ConfigError(InputError):
    """An option or configuration field has an invalid value."""


class DataError(InputError):
    """An image folder or image file cannot be used."""


class CheckpointError(InputError):
    """A checkpoint is foreign, damaged, or contains code."""


class ModelFileError(InputError):
    """An ONNX file, engine or sidecar cannot be used."""


class SessionClosed(InputError):
    """The session or batcher was closed before the request ran."""


class SpecError(InputError):
    """A model spec is missing or invalid."""


class OutputError(AdvPropError, OSError):
    """The output cannot be written. No incomplete file is left behind."""

    exit_code = 2


class BackendUnavailable(AdvPropError):
    """A required library, driver or GPU is missing.

    Attributes:
        reason: what is missing, as a phrase that fits into another message.
    """

    exit_code = 3

    def __init__(self, message: str = "", *, reason: str = "", fix: str = "") -> None:
        super().__init__(message, fix=fix)
        self.reason = reason or message


class EngineBuildError(AdvPropError):
    """The engine builder rejected the graph."""

    exit_code = 3


class RunFailed(AdvPropError):
    """The backend failed while it ran the model on valid input."""

    exit_code = 3


class VerificationError(AdvPropError):
    """The output of a stage disagrees with the previous stage. The files are kept."""

    exit_code = 4


class TrainingDiverged(AdvPropError):
    """The loss or the weights are no longer finite."""

    exit_code = 5


class GateFailed(AdvPropError):
    """The measurements show a condition under which a comparison is to fail."""

    exit_code = 5


class AdaptationRefused(AdvPropError):
    """The images do not show that an adapted model would be better. No file is written."""

    exit_code = 5


class RequestNotServed(AdvPropError):
    """The server is overloaded. The same request may succeed later."""

    exit_code = 6


class QueueFull(RequestNotServed):
    """The request queue has no room for the request."""


class DeadlineExceeded(RequestNotServed, TimeoutError):
    """The deadline passed before the result was ready."""


class Interrupted(AdvPropError):
    """The run was stopped by SIGINT or SIGTERM and saved its state first."""

    exit_code = 130

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """Return the first 200 characters of an error's first line, or its type if it is empty."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return "did you mean …?" with up to `count` similar names, or "" if no name is similar."""
    matches = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"did you mean {' or '.join(matches)}?" if matches else ""
