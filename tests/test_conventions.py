"""Rules for tests, checked in their source code."""

import ast
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGES = frozenset({"advprop", "calib", "export", "runtime", "train"})
PATCHES = frozenset({"delattr", "setattr"})
"""Functions of `monkeypatch` that replace code; the others change the environment of a process."""
ALLOWED = frozenset({("os", "_exit"), ("torch.nn.modules.batchnorm", "_BatchNorm")})
"""(module, private name): the documented way to end a forked process, and torch's only base class of
all BatchNorms."""

TESTED_BENCHMARKS = ("benchmarks.fidelity.", "benchmarks.adapt_cifar.", "benchmarks.adapt_cifar_report.")
"""Benchmarks whose runs take a day, so their parts and a toy run are tested."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def fault_of_import(module: str, names: list[str]) -> str | None:
    top = module.partition(".")[0]
    if f"{module}.".startswith(TESTED_BENCHMARKS):
        return None
    if top == "benchmarks" or any(part.startswith("test_") for part in module.split(".")):
        return f"imports {module}"
    if top == "tests" and any(name.startswith("test_") for name in names):
        return f"imports a test of {module}"
    private = [name for name in (*module.split("."), *names) if is_private(name)]
    return f"imports the private name {private[0]}" if private and top in PACKAGES else None


def fault_of_attribute(node: ast.Attribute) -> str | None:
    if not is_private(node.attr) or not isinstance(node.value, ast.Name | ast.Attribute | ast.Call | ast.Subscript):
        return None
    owner = ast.unparse(node.value)
    own = owner in ("self", "cls", "super()")
    return None if own or (owner, node.attr) in ALLOWED else f"reads {owner}.{node.attr}"


def faults(source: str) -> list[str]:
    """Return the violations of the rules in a test module."""
    found: list[str | None] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [fault_of_import(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(fault_of_import(node.module or "", [alias.name for alias in node.names]))
        elif isinstance(node, ast.Attribute):
            found.append(fault_of_attribute(node))
            if node.attr in PATCHES and ast.unparse(node.value) == "monkeypatch":
                found.append(f"calls monkeypatch.{node.attr}")
            if node.attr in ("mock", "patch") and ast.unparse(node.value) in ("mock", "mocker", "unittest"):
                found.append("uses mocks")
    return [fault for fault in found if fault]


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.name)
def test_tests_use_public_names_and_patch_nothing(path: Path) -> None:
    assert faults(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import benchmarks.int8",
        "from benchmarks.families import NETS",
        "from tests.train.test_loop import small",
        "from tests.train import test_loop",
        "from calib.ptq import _scale",
        "from runtime._private import load",
        "session.backend._run(images)",
        "runtime.loading._open(path)",
        "monkeypatch.setattr(runtime, 'load', None)",
        "with unittest.mock.patch('runtime.load'): pass",
    ],
)
def test_a_violation_is_found(source: str) -> None:
    assert len(faults(source)) == 1


def test_permitted_code_is_not_reported() -> None:
    source = """
import runtime, tests.support
from tests.support.networks import graph
from torch._C import something
monkeypatch.setenv("A", "b")
os._exit(1)
self._helper()
model.__class__
"""
    assert faults(source) == []
