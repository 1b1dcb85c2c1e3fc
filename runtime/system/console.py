"""Logging, progress and results on the terminal, shared by all commands.

Results go to stdout. Log messages and progress go to stderr, which keeps `--json` output clean.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.status import Status

__all__ = ["VERBOSITY", "engine_bar", "print_lines", "progress_bars", "set_up_logging", "status", "verbosity"]

VERBOSITY = "advprop.verbosity"
"""Key of the verbosity in the metadata of click's context."""

_BAR_WIDTH = 30
_LOGGERS = ("advprop", "train", "export", "calib", "runtime")


def verbosity() -> int:
    """Return -1 after --quiet, 1 after --verbose, and 0 otherwise."""
    context = click.get_current_context(silent=True)
    return int(context.find_root().meta.get(VERBOSITY, 0)) if context else 0


def set_up_logging() -> Console:
    """Send the log of advprop's packages to stderr through rich, and return a console for results.

    Only commands call this. Programs that import the packages configure `logging` themselves.
    """
    from rich.console import Console
    from rich.logging import RichHandler

    handler = RichHandler(
        console=Console(stderr=True), show_time=False, show_path=False, show_level=True, highlighter=None
    )
    level = {-1: logging.WARNING, 0: logging.INFO, 1: logging.DEBUG}[verbosity()]
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers = [handler]
    return Console()


def print_lines(console: Console, lines: Iterable[str]) -> None:
    """Print lines unchanged: no wrapping, no colors, no markup."""
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _progress_console() -> Console:
    """Return the log's console, which prints messages above progress bars; silent if --quiet."""
    from rich.console import Console
    from rich.logging import RichHandler

    handlers = logging.getLogger("runtime").handlers
    shared = next((handler.console for handler in handlers if isinstance(handler, RichHandler)), None)
    return Console(quiet=True) if verbosity() < 0 or shared is None else shared


def status(text: str) -> Status:
    """Return a spinner with a text, for work of unknown duration."""
    return _progress_console().status(text)


def progress_bars(*, counts: bool = True, auto_refresh: bool = True) -> Progress:
    """Return rich progress bars that disappear when they are done.

    Args:
        counts: show "done/total" instead of a percentage.
        auto_refresh: redraw from a thread; otherwise only when a bar is updated with
            `refresh=True`.
    """
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn() if counts else progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(*columns, console=_progress_console(), transient=True, auto_refresh=auto_refresh)


def engine_bar(status: Status) -> Callable[[str, float], None]:
    """Return a progress callback for `runtime.build` that draws a bar in `status`."""
    from rich.markup import escape

    def draw(phase: str, share: float) -> None:
        done = round(share * _BAR_WIDTH)
        bar = f"[green]{'━' * done}[/green][dim]{'━' * (_BAR_WIDTH - done)}[/dim]"
        status.update(f"building the engine {bar} {share:4.0%} {escape(phase)}")

    return draw
