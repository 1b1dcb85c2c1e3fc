"""Lazy imports: a package's names load their module when they are first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from runtime.system.slices import missing_package

__all__ = ["lazy_names"]


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's `__getattr__`, which imports each name from its module on first use.

    Args:
        package: the package's own name, for messages.
        modules: name → the module that defines it.
    """

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(importlib.import_module(modules[name]), name)
        except ImportError as error:
            missing = missing_package(error)
            if missing is None:
                raise
            raise missing from error

    return load
