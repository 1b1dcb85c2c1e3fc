"""The notes at the end of a help page, which fit the width of the terminal: examples, lists and prose."""

from __future__ import annotations

import re
import textwrap

import click

__all__ = ["MAX_WIDTH", "write_notes"]

MAX_WIDTH = 120
"""Maximum width of a help page, in columns. A narrower terminal gets a narrower page."""
_GAP = re.compile(r"(?<=\S) {2,}(?=\S)")


def write_notes(formatter: click.HelpFormatter, notes: str) -> None:
    """Write the notes at the end of a help page.

    Args:
        formatter: the page.
        notes: paragraphs separated by blank lines, each one of:
            - `Examples:`, then indented lines `command`, or `command  comment`;
            - `TITLE:`, then indented lines `term  description`;
            - prose.
    """
    for paragraph in notes.strip().split("\n\n"):
        title, *rows = paragraph.splitlines()
        if title == "Examples:":
            _write_examples(formatter, [row.strip() for row in rows])
        elif rows and all(_GAP.search(row.strip()) for row in rows):
            with formatter.section(title.removesuffix(":")):
                formatter.write_dl([tuple(_GAP.split(row.strip(), maxsplit=1)) for row in rows])  # type: ignore[misc]
        else:
            formatter.write_paragraph()
            formatter.write_text(" ".join(line.strip() for line in (title, *rows)))


def _write_examples(formatter: click.HelpFormatter, rows: list[str]) -> None:
    width = formatter.width - formatter.indent_increment
    fits = all(len(row) <= width for row in rows)
    with formatter.section("Examples"):
        for row in rows:
            command, *comment = [row] if fits else _GAP.split(row, maxsplit=1)
            lines = [f"# {text}" for text in comment] + _continued(command, width)
            formatter.write("".join(f"{'':{formatter.current_indent}}{line}\n" for line in lines))


def _continued(command: str, width: int) -> list[str]:
    """Return a command as lines that a shell joins."""
    if len(command) <= width:
        return [command]
    joined = re.sub(r"(--[\w-]+) (?=[^-])", "\\1\N{NO-BREAK SPACE}", command)  # keeps an option and its value together
    lines = textwrap.wrap(joined, width - 2, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    lines = [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]
