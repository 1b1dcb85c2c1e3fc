"""Detect modules of other projects that hide our top-level packages, such as a local `train.py`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

__all__ = ["PACKAGES", "ROOT", "check_packages", "prefer_own_packages"]

ROOT = Path(__file__).resolve().parents[1]
"""The folder that contains our packages."""

PACKAGES = ("runtime", "calib", "train", "export")
"""Our other top-level packages. Each imports only packages before it."""


def check_packages(packages: Sequence[str] = PACKAGES) -> None:
    """Check that imports find our packages, and not files of another project with the same name.

    Raises:
        ImportError: a package is hidden; the message names the file and how to fix it.
    """
    for name in packages:
        found = _hidden_by(name)
        if found is None:
            continue
        own, script = ROOT / name, getattr(sys.modules.get("__main__"), "__file__", None)
        if script is not None and found == Path(script).resolve():
            fix = f"Rename your script, for example to my_{found.name}"
        else:
            fix = f"Rename it, or keep {found.parent} off Python's path (PYTHONPATH, or the folder of your script)"
        raise ImportError(f"{found} hides advprop's package {name!r} in {own}. {fix}", name=name)


def prefer_own_packages() -> None:
    """Make imports find our packages first, in a process that runs one of our commands.

    Python searches the working directory (`python -m advprop`) and PYTHONPATH before the folder
    that advprop is installed in. The path changes only if a package is hidden.

    Raises:
        ImportError: another package with the name of ours is already imported.
    """
    if any(_hidden_by(name) for name in PACKAGES):
        sys.path.insert(0, str(ROOT))
        importlib.invalidate_caches()
        check_packages()


def _hidden_by(name: str) -> Path | None:
    """Return the file or folder that an import of our package `name` finds instead; None if ours."""
    try:
        spec = find_spec(name)
    except ValueError:  # a module without a spec was put into sys.modules
        spec = None
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or ())
    file = Path(spec.origin if spec.origin and not folders else folders[0] if folders else "").resolve()
    return None if file == ROOT / name else file
