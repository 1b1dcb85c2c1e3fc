"""Logging, progress bars and error reporting on the terminal, shared by all commands."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec

import click

from runtime.errors import AdvPropError, Interrupted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.status import Status

__all__ = ["cli_errors", "counting_bars", "engine_bar", "set_up_logging"]

_Parameters = ParamSpec("_Parameters")
_BAR_WIDTH = 30
_LOGGERS = ("advprop", "train", "export", "calib", "runtime")


def set_up_logging(verbose: bool = False) -> Console:
    """Send the log of our packages to the terminal through rich, and return the console.

    Only commands call this. A program that imports our packages configures `logging` itself.
    """
    from rich.console import Console
    from rich.logging import RichHandler

    console = Console(stderr=False)
    handler = RichHandler(console=console, show_time=False, show_path=False, show_level=True, highlighter=None)
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG if verbose else logging.INFO)
        logger.handlers = [handler]
    return console


def counting_bars(console: Console, *, counts: bool = True, auto_refresh: bool = True) -> Progress:
    """Return rich progress bars that disappear when they are done.

    Args:
        console: the console to draw on.
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
    return progress.Progress(*columns, console=console, transient=True, auto_refresh=auto_refresh)


def engine_bar(status: Status) -> Callable[[str, float], None]:
    """Return a progress callback for `runtime.build` that draws a bar in `status`."""
    from rich.markup import escape

    def draw(phase: str, share: float) -> None:
        done = round(share * _BAR_WIDTH)
        bar = f"[green]{'━' * done}[/green][dim]{'━' * (_BAR_WIDTH - done)}[/dim]"
        status.update(f"building the engine {bar} {share:4.0%} {escape(phase)}")

    return draw


def cli_errors(command: Callable[_Parameters, None]) -> Callable[_Parameters, None]:
    """Make a command print our errors as `error: …` on stderr and exit with their exit code."""

    @functools.wraps(command)
    def wrapped(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except AdvPropError as error:
            click.echo(str(error) if isinstance(error, Interrupted) else f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("Interrupted. No incomplete file was left behind.", err=True)
            sys.exit(130)

    return wrapped
