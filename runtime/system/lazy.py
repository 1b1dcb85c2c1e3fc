"""Packages whose names load when used, so that command-line help waits for no library."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from runtime.errors import BackendUnavailable

__all__ = ["elsewhere", "lazy_names"]


def elsewhere(place: str, purpose: str, otherwise: str) -> Any:
    """Imports what another of our packages brings, on which the runtime does not depend.

    Args:
        place: `module:name`.
        purpose: what needs PyTorch, for the message.
        otherwise: what to do without it.

    Raises:
        BackendUnavailable: torch, timm or the package is missing.
    """
    module, name = place.split(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise BackendUnavailable(f"{purpose} needs torch and timm ({error}); install them, or {otherwise}") from error


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns a module's `__getattr__` that imports each of `homes`' names from its module.

    Args:
        package: the package's own name, for messages.
        homes: name → the module that defines it.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return load
