"""What every command line shares: logging on the terminal, errors, exit codes."""

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
_BAR = 30  # characters
_OURS = ("advprop", "train", "export", "calib", "runtime")


def set_up_logging(verbose: bool = False) -> Console:
    """Sends our packages' log to the terminal through rich, and returns the console.

    Only command lines call this; a program that imports us configures `logging` itself.
    """
    from rich.console import Console
    from rich.logging import RichHandler

    console = Console(stderr=False)
    handler = RichHandler(console=console, show_time=False, show_path=False, show_level=True, highlighter=None)
    for name in _OURS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG if verbose else logging.INFO)
        logger.handlers = [handler]
    return console


def counting_bars(console: Console, *, counts: bool = True, auto_refresh: bool = True) -> Progress:
    """Returns rich's progress bars, which go when they are done.

    Args:
        console: where they are.
        counts: show how many of how many, else a share.
        auto_refresh: draw them from a thread; else when they are updated with `refresh`.
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
    """Returns a progress callback of `runtime.build` that draws a bar in `status`."""
    from rich.markup import escape

    def draw(phase: str, share: float) -> None:
        done = round(share * _BAR)
        bar = f"[green]{'━' * done}[/green][dim]{'━' * (_BAR - done)}[/dim]"
        status.update(f"building the engine {bar} {share:4.0%} {escape(phase)}")

    return draw


def cli_errors(command: Callable[_Parameters, None]) -> Callable[_Parameters, None]:
    """Turns our errors into `error: …` on stderr and the exit code of `runtime.errors`."""

    @functools.wraps(command)
    def wrapped(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except AdvPropError as error:
            click.echo(str(error) if isinstance(error, Interrupted) else f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("stopped: nothing half-written was left", err=True)
            sys.exit(130)

    return wrapped
