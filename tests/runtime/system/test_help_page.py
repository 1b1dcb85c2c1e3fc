"""Help pages fit the terminal, and their examples can be pasted at any width."""

import os
import re
import shlex
import subprocess
import sys

import click
import pytest

from advprop.cli import COMMANDS
from runtime.system.help_page import MAX_WIDTH, write_notes
from tests.support import ROOT

NOTES = """
Examples:
  advprop bench model.onnx --batch-sizes 1,8 --threads 4     two batch sizes
  advprop bench model.onnx

Attacks:
  pgd     uses the gradient of --checkpoint
  square  uses the logits

To resume an interrupted run, repeat
its command.
"""


def notes(width: int) -> str:
    """Return NOTES as a page of `width` columns shows them."""
    formatter = click.HelpFormatter(width=width)
    write_notes(formatter, NOTES)
    return formatter.getvalue()


def help_page(command: str, columns: int) -> str:
    """Return the help page of a command, as a terminal of this width gets it."""
    run = subprocess.run(
        [sys.executable, "-m", "advprop", command, "-h"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": str(columns)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_comments_are_next_to_their_commands_on_a_wide_page() -> None:
    assert "  advprop bench model.onnx --batch-sizes 1,8 --threads 4     two batch sizes\n" in notes(100)


def test_comments_are_above_their_commands_on_a_narrow_page() -> None:
    assert "  # two batch sizes\n  advprop bench model.onnx --batch-sizes 1,8 --threads 4\n" in notes(70)


def test_a_long_command_is_continued_without_parting_an_option_from_its_value() -> None:
    text = notes(40)
    assert "  advprop bench model.onnx \\\n      --batch-sizes 1,8 --threads 4\n" in text
    example = re.search(r"advprop bench.*?--threads 4", text, re.DOTALL)
    assert example
    assert shlex.split(example[0].replace("\\\n", "")) == shlex.split(
        "advprop bench model.onnx --batch-sizes 1,8 --threads 4"
    )


def test_prose_and_lists_are_wrapped() -> None:
    assert "To resume an interrupted run, repeat its\ncommand.\n" in notes(42)
    assert "Attacks:\n  pgd     uses the gradient of\n          --checkpoint\n" in notes(34)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_page_fits_the_terminal(command: str, columns: int) -> None:
    page = help_page(command, columns)
    assert max(map(len, page.splitlines())) <= columns
    assert "Examples:\n" in page


def test_a_help_page_is_not_wider_than_its_maximum() -> None:
    widest = max(map(len, help_page("export", 200).splitlines()))
    assert 100 < widest <= MAX_WIDTH
