"""Every error that advprop raises on purpose.

    AdvPropError                      exit code 1
    ├── InputError (ValueError)       2  what the user gave is wrong
    │   ├── ArchError                    unknown, or without the layers the recipe needs
    │   ├── ConfigError                  an option or field with an impossible value
    │   ├── DataError                    image folders and image files
    │   ├── CheckpointError              not ours, truncated, unsafe
    │   ├── ModelFileError               ONNX files, engines and their sidecars
    │   ├── SessionClosed                asked after `close`, or still waiting then
    │   └── SpecError                    the description inside a model file
    ├── OutputError (OSError)         2  a place that cannot be written
    ├── BackendUnavailable            3  a library, driver or GPU is missing
    ├── EngineBuildError              3  the builder refused the graph
    ├── RunFailed                     3  the backend failed while running the model
    ├── VerificationError             4  a stage does not agree with the one before
    ├── TrainingDiverged              5  loss or weights are not finite
    ├── NotAnswered                   6  nothing is wrong with the request; there is too much to do
    │   ├── QueueFull                    refused: as many images wait as may
    │   └── DeadlineExceeded             the answer came, or would come, too late
    └── Interrupted                 130  Ctrl-C (143: SIGTERM), work saved

A message says what was found, what was expected, and how to put it right.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AdvPropError",
    "ArchError",
    "BackendUnavailable",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeadlineExceeded",
    "EngineBuildError",
    "InputError",
    "Interrupted",
    "ModelFileError",
    "NotAnswered",
    "OutputError",
    "QueueFull",
    "RunFailed",
    "SessionClosed",
    "SpecError",
    "TrainingDiverged",
    "VerificationError",
    "first_line",
    "nearest",
]


class AdvPropError(Exception):
    """Root of the tree. `exit_code` is what a command line returns for it."""

    exit_code = 1


class InputError(AdvPropError, ValueError):
    """What the user gave is wrong."""

    exit_code = 2


class ArchError(InputError):
    """An architecture that timm does not have, or that the recipe cannot use."""


class ConfigError(InputError):
    """An option or configuration field with an impossible value."""


class DataError(InputError):
    """An image folder or image file that cannot be used."""


class CheckpointError(InputError):
    """A checkpoint that is not ours, is damaged, or holds code."""


class ModelFileError(InputError):
    """An ONNX file, engine or sidecar that cannot be used."""


class SessionClosed(InputError):
    """A session or batcher was asked after its `close`, or closed before it came to this request."""


class SpecError(InputError):
    """A model description that is missing or does not make sense."""


class OutputError(AdvPropError, OSError):
    """A place that cannot be written; nothing half-written is left."""

    exit_code = 2


class BackendUnavailable(AdvPropError):
    """A library, driver or GPU that this step needs is missing."""

    exit_code = 3


class EngineBuildError(AdvPropError):
    """The engine builder refused the graph."""

    exit_code = 3


class RunFailed(AdvPropError):
    """The backend failed while it ran the model on input that it had accepted."""

    exit_code = 3


class VerificationError(AdvPropError):
    """A stage's output does not agree with the stage before; files are kept."""

    exit_code = 4


class TrainingDiverged(AdvPropError):
    """The loss or the weights stopped being finite."""

    exit_code = 5


class NotAnswered(AdvPropError):
    """Too much was asked at once; the same request may be answered later."""

    exit_code = 6


class QueueFull(NotAnswered):
    """The request was refused: as many images wait already as may."""


class DeadlineExceeded(NotAnswered, TimeoutError):
    """The answer was not there in the time that the request gave."""


class Interrupted(AdvPropError):
    """The run was asked to stop (SIGINT or SIGTERM) and saved its state first."""

    exit_code = 130

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, shortened, or the name of its kind."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Returns "did you mean …?" for a misspelled `name`, or "" where nothing is near."""
    matches = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"did you mean {' or '.join(matches)}?" if matches else ""
