"""The runtime stays light: what it imports, and what works without other packages."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import runtime
from advprop.cli import COMMANDS
from tests.support import ROOT


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    run = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with only the packages click and NumPy."""
    import click
    import numpy

    folder = tmp_path_factory.mktemp("bare")
    site = Path(numpy.__file__).parent.parent
    for source in (Path(click.__file__).parent, Path(numpy.__file__).parent, site / "numpy.libs"):
        if source.exists():
            (folder / source.name).symlink_to(source)
    return folder


def test_import_runtime_loads_nothing_heavier_than_numpy() -> None:
    program = (
        "import sys, numpy; before = set(sys.modules)\n"
        "import runtime; print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    loaded = set(python("-c", program).stdout.split())
    assert loaded - sys.stdlib_module_names <= {"numpy", "runtime"}
    assert not loaded & {"asyncio", "multiprocessing", "sqlite3", "tkinter", "unittest", "xml"}


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_works_with_click_and_numpy_only(bare: Path, arguments: list[str]) -> None:
    program = (
        "import sys; from importlib.util import find_spec\n"
        "assert find_spec('torch') is None and find_spec('rich') is None and find_spec('onnxruntime') is None\n"
        f"from advprop.cli import main; main({arguments!r}, prog_name='advprop')"
    )
    run = python("-S", "-c", program, PYTHONPATH=f"{bare}{os.pathsep}{ROOT}")
    assert "Usage: advprop" in run.stdout


def test_import_runtime_works_with_numpy_only(bare: Path) -> None:
    program = "import runtime; print(runtime.Session.__name__)"
    assert python("-S", "-c", program, PYTHONPATH=f"{bare}{os.pathsep}{ROOT}").stdout.strip() == "Session"


def test_exported_names_are_sorted_and_exist() -> None:
    import calib
    import export
    import train

    for package in (runtime, train, export, calib):
        names = package.__all__
        assert list(names) == sorted(names), package.__name__
        assert all(getattr(package, name) is not None for name in names)
    with pytest.raises(AttributeError):
        train.nothing  # noqa: B018


def test_the_drawn_error_tree_is_complete() -> None:
    drawn = re.findall(r"[├└]── (\w+)", runtime.errors.__doc__)
    defined = [name for name in runtime.errors.__all__ if name not in ("AdvPropError", "first_line", "nearest")]
    assert sorted(drawn) == sorted(defined)
    codes = dict(re.findall(r"[├└]── (\w+)[^\d\n]*(\d+)", runtime.errors.__doc__))
    for name, code in codes.items():
        error = getattr(runtime.errors, name)
        assert error.exit_code == int(code), name
