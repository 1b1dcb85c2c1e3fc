"""Inject an error at any call of a module: `install` replaces each call `f(x)` by one that may fail.

The modules are rewritten when they are imported, so this must run in a process of its own, before
they are. The rest of the program is the real one.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

_NAME = "__fault__"


@dataclass
class Faults:
    """The calls of the rewritten modules, and the one that fails."""

    places: list[str] = field(default_factory=list)
    """`module:line: source` of each call."""
    place: int = -1
    """Index of the call that fails; −1: none."""
    error: type[BaseException] = MemoryError
    """What it raises."""
    first: int = 1
    """Which execution of the call fails first, from 1 on."""
    times: int = 1
    """How many executions fail in a row."""
    hits: int = 0
    """How often the call was reached since `arm`."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def arm(self, place: int, error: type[BaseException], first: int = 1, times: int = 1) -> None:
        """Let a call fail `times` times in a row, from its execution number `first` on."""
        self.place, self.error, self.first, self.times, self.hits = place, error, first, times, 0

    def check(self, place: int) -> None:
        """Raise the error if this call is to fail now."""
        if place != self.place:
            return
        with self._lock:
            self.hits += 1
            fails = self.first <= self.hits < self.first + self.times
        if fails:
            raise self.error("injected")


def install(modules: Sequence[str]) -> Faults:
    """Rewrite modules as they are imported. Return what controls their faults."""
    faults = Faults()
    sys.meta_path.insert(0, _Finder(frozenset(modules), faults))
    return faults


class _Calls(ast.NodeTransformer):
    def __init__(self, module: str, faults: Faults) -> None:
        self._module, self._faults = module, faults

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.body = [self.visit(statement) for statement in node.body]  # not decorators, defaults and annotations
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        node.body = [self.visit(item) if isinstance(item, ast.FunctionDef) else item for item in node.body]
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        place = len(self._faults.places)
        self._faults.places.append(f"{self._module}:{node.lineno}: {ast.unparse(node)[:70]}")
        self.generic_visit(node)
        if ast.unparse(node.func) == "super":  # needs its own frame
            return node
        check = ast.Call(ast.Name(_NAME, ast.Load()), [ast.Constant(place)], [])
        both = ast.Subscript(ast.Tuple([check, node], ast.Load()), ast.Constant(1), ast.Load())
        return ast.copy_location(both, node)


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, faults: Faults) -> None:
        super().__init__(name, path)
        self._faults = faults

    def get_code(self, fullname: str) -> Any:
        """Return the code with a check before each call inside a function."""
        tree = ast.parse(self.get_data(self.path))
        rewrite = _Calls(fullname, self._faults)
        tree.body = [
            rewrite.visit(item) if isinstance(item, ast.FunctionDef | ast.ClassDef) else item for item in tree.body
        ]
        return compile(ast.fix_missing_locations(tree), self.path, "exec")

    def exec_module(self, module: ModuleType) -> None:
        """Run the rewritten code."""
        module.__dict__[_NAME] = self._faults.check
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, modules: frozenset[str], faults: Faults) -> None:
        self._modules, self._faults = modules, faults

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of a module to rewrite."""
        if fullname not in self._modules:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec and spec.origin
        return importlib.util.spec_from_file_location(
            fullname, spec.origin, loader=_Loader(fullname, spec.origin, self._faults)
        )
