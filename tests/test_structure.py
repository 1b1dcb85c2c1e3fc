"""The structure of the packages: what imports what, and what CONTRIBUTING.md writes about it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

from tests.support import ROOT

PACKAGES = ("advprop", "train", "export", "calib", "runtime")
TOP_LEVEL = {*PACKAGES, "tests", "benchmarks", "scripts", "examples", "docs"}


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    """The graph of all imports of the packages."""
    return grimp.build_graph(*PACKAGES, cache_dir=None)


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the packages in `folder`."""
    program = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache"],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the packages and of pyproject.toml, without the rest of the repository."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_all_import_contracts_hold(copy: Path) -> None:
    run = lint_imports(copy)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 broken" in run.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("runtime/session.py", "import runtime.evaluate", "The core of the runtime does not import its tools"),
        ("runtime/system/files.py", "import runtime.graph.model", "Layers of the runtime"),
        ("runtime/backends/base.py", "import runtime.backends.tensorrt", "Layers of the backends"),
        ("train/loop.py", "import runtime.bench", "Training imports no tools of the runtime"),
        ("calib/config.py", "import train.loop", "Packages depend in one direction"),
        (
            "runtime/batching/core.py",
            "import runtime.serve.tensors",
            "The core of the runtime does not import its tools",
        ),
        (
            "runtime/bench/run.py",
            "import runtime.evaluate.counts",
            "Evaluation, benchmarks and servers do not import each other",
        ),
    ],
)
def test_a_forbidden_import_breaks_its_contract(copy: Path, module: str, line: str, contract: str) -> None:
    source = copy / module
    text = source.read_text()
    assert "\nfrom __future__ import annotations\n" in text
    source.write_text(
        text.replace("\nfrom __future__ import annotations\n", f"\nfrom __future__ import annotations\n{line}\n")
    )

    run = lint_imports(copy)

    assert run.returncode == 1
    assert f"{contract} BROKEN" in run.stdout


def test_the_first_levels_stay_small(graph: grimp.ImportGraph) -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("**/*.py"))}
    assert {name for name in folders if not name.startswith((".", "build"))} <= TOP_LEVEL
    assert len(graph.find_children("runtime")) <= 16


def test_packages_of_the_runtime_have_no_import_cycle(graph: grimp.ImportGraph) -> None:
    children = sorted(graph.find_children("runtime"))
    imports = {
        child: {
            other
            for other in children
            if other != child and graph.direct_import_exists(importer=child, imported=other, as_packages=True)
        }
        for child in children
    }
    while leaves := {child for child, others in imports.items() if not others}:
        imports = {child: others - leaves for child, others in imports.items() if child not in leaves}
    assert imports == {}, "these packages import each other"


def test_every_path_in_the_guide_for_contributors_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = {path for path in re.findall(r"`([\w./-]+(?:/|\.py|\.md|\.toml))`", text) if "NAME" not in path}
    assert len(paths) > 30
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_the_guide_for_contributors_lists_every_package() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    packages = set(PACKAGES)
    packages |= {
        path.parent.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).glob("*/__init__.py")
    }
    assert [package for package in sorted(packages) if f"`{package}/`" not in text] == []
