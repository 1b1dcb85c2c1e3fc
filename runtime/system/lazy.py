"""Lazy imports: a package's names load their module when they are first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from runtime.errors import BackendUnavailable

__all__ = ["elsewhere", "lazy_names"]


def elsewhere(place: str, purpose: str, otherwise: str) -> Any:
    """Import a name from another of our packages, on which the runtime does not depend.

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


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's `__getattr__`, which imports each name from its module on first use.

    Args:
        package: the package's own name, for messages.
        modules: name → the module that defines it.
    """

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name]), name)

    return load
