"""Logging, progress and results on the terminal, shared by all commands.

Results go to stdout. Log messages and progress go to stderr, which keeps `--json` output clean.

Names of files, classes, layers and GPUs are foreign text. All text passes through `clean`, which
removes the characters that control a terminal, and nothing is parsed as rich's markup.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.progress import Progress
    from rich.segment import Segment
    from rich.status import Status

__all__ = [
    "VERBOSITY",
    "clean",
    "engine_bar",
    "print_json",
    "print_lines",
    "progress_bars",
    "set_up_logging",
    "status",
    "verbosity",
]

VERBOSITY = "advprop.verbosity"
"""Key of the verbosity in the metadata of click's context."""

_BAR_WIDTH = 30
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and newline, characters that change the direction of text, and
bytes of file names that are not UTF-8, which cannot be printed."""
_LOGGERS = ("advprop", "train", "export", "calib", "runtime")


def verbosity() -> int:
    """Return -1 after --quiet, 1 after --verbose, and 0 otherwise."""
    context = click.get_current_context(silent=True)
    return int(context.find_root().meta.get(VERBOSITY, 0)) if context else 0


def clean(text: str) -> str:
    """Remove the characters that could control or confuse a terminal."""
    return _UNSAFE.sub("", text)


def print_json(content: Any, indent: int | None = 1) -> None:
    """Print JSON to stdout. Characters that `clean` would remove are escaped."""
    text = json.dumps(content, indent=indent, ensure_ascii=False, default=str)
    click.echo(_UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def _open_console(*, stderr: bool = False) -> Console:
    """Return a console that cleans all text and parses no markup."""
    from rich.console import Console

    class CleanConsole(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=clean(segment.text))

    return CleanConsole(stderr=stderr, markup=False)


def set_up_logging() -> Console:
    """Send the log of advprop's packages to stderr through rich, and return a console for results.

    Only commands call this. Programs that import the packages configure `logging` themselves.
    """
    from rich.logging import RichHandler

    handler = RichHandler(
        console=_open_console(stderr=True), show_time=False, show_path=False, show_level=True, highlighter=None
    )
    level = {-1: logging.WARNING, 0: logging.INFO, 1: logging.DEBUG}[verbosity()]
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers = [handler]
    return _open_console()


def print_lines(console: Console, lines: Iterable[str]) -> None:
    """Print lines without wrapping and colors."""
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _progress_console() -> Console:
    """Return the log's console, which prints messages above progress bars; silent if --quiet."""
    from rich.console import Console
    from rich.logging import RichHandler

    handlers = logging.getLogger("runtime").handlers
    shared = next((handler.console for handler in handlers if isinstance(handler, RichHandler)), None)
    return Console(quiet=True) if verbosity() < 0 or shared is None else shared


def status(text: str) -> Status:
    """Return a spinner with a text, for work of unknown duration."""
    from rich.status import Status
    from rich.text import Text

    class PlainStatus(Status):
        """A status whose texts are not parsed as markup."""

        def update(self, status: RenderableType | None = None, **settings: Any) -> None:
            super().update(Text(status) if isinstance(status, str) else status, **settings)

    return PlainStatus(Text(text), console=_progress_console())


def progress_bars(*, counts: bool = True, auto_refresh: bool = True) -> Progress:
    """Return rich progress bars that disappear when they are done.

    Args:
        counts: show "done/total" instead of a percentage.
        auto_refresh: redraw from a thread; otherwise only when a bar is updated with
            `refresh=True`.
    """
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn() if counts else progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(*columns, console=_progress_console(), transient=True, auto_refresh=auto_refresh)


def engine_bar(status: Status) -> Callable[[str, float], None]:
    """Return a progress callback for `runtime.build` that draws a bar in `status`."""
    from rich.text import Text

    def draw(phase: str, share: float) -> None:
        done = round(share * _BAR_WIDTH)
        bar = (("━" * done, "green"), ("━" * (_BAR_WIDTH - done), "dim"))
        status.update(Text.assemble("building the engine ", *bar, f" {share:4.0%} {phase}"))

    return draw
