"""`scripts/check_prose` finds turns that this project does not write."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT


def check_prose(*paths: Path) -> subprocess.CompletedProcess[str]:
    """Run `scripts/check_prose` on files."""
    command = [sys.executable, str(ROOT / "scripts" / "check_prose"), *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("name", "content", "line", "finding"),
    [
        ("a.py", '"""Return the sum."""\n\n# All layers but for the last.\n', 3, "write except"),
        ("a.py", '"""Return a quantised sum."""\n', 1, "'quantised'"),
        ("a.py", '"""Return the sum.\n\nThe sizes are scaled likewise.\n"""\n', 3, "'likewise'"),
        ("a.py", 'raise ValueError(f"{1} files, all but\\n for the last")\n', 1, "write except"),
        ("a.md", "# Title\n\n```sh\nbut for code\n```\n\nAll layers\nbut for the last.\n", 8, "write except"),
    ],
    ids=["comment", "British spelling", "docstring", "message", "document"],
)
def test_a_banned_turn_is_reported_with_its_line(
    tmp_path: Path, name: str, content: str, line: int, finding: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    run = check_prose(path)
    assert run.returncode == 1, run.stderr
    (found,) = run.stdout.splitlines()
    assert found.startswith(f"{path}:{line}: ")
    assert finding in found


def test_code_is_not_prose(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("# Title\n\n```sh\necho but for code\n```\n\nRun `but for`.\n")
    run = check_prose(path)
    assert run.returncode == 0, run.stdout


def test_plain_text_passes(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text('"""Return the largest magnitude of each tensor."""\n')
    assert check_prose(path).stdout == "1 files: no findings\n"


def test_spelling_is_american(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("The colour of a tensor.\n")  # codespell:ignore
    command = [sys.executable, "-m", "codespell_lib", "--toml", str(ROOT / "pyproject.toml"), str(tmp_path / "a.md")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode != 0
    assert "colour ==> color" in run.stdout  # codespell:ignore
