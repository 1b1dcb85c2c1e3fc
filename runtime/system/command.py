"""What every command has in common: grouped help, -h, -q, -v, --version, errors and exit codes.

@click.command("bench", cls=Command, epilog=EXAMPLES)
@click.option("--rounds", cls=Option, group="Measurement", former=["--turns"], …)
def main(rounds: int) -> None: …
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import click

from runtime.errors import AdvPropError, ConfigError, Interrupted
from runtime.spec import ImageSizes

__all__ = [
    "CommaList",
    "Command",
    "Option",
    "as_config",
    "device_option",
    "image_size_option",
    "verbosity",
]

_VERBOSITY = "advprop.verbosity"
_GENERAL = "General"
_GENERAL_NAMES = ("--quiet", "--verbose", "--version", "--help")
_Item = TypeVar("_Item")
_Function = TypeVar("_Function", bound=Callable[..., Any])


def verbosity() -> int:
    """Return -1 after --quiet, 1 after --verbose and 0 otherwise."""
    context = click.get_current_context(silent=True)
    return int(context.find_root().meta.get(_VERBOSITY, 0)) if context else 0


class Option(click.Option):
    """An option with a heading in the help page, and names that still work but are no longer shown."""

    def __init__(
        self,
        param_decls: Sequence[str] | None = None,
        *,
        group: str = "",
        former: Sequence[str] = (),
        **attributes: Any,
    ) -> None:
        """
        Args:
            param_decls: as in click.
            group: heading that the option is listed under; empty: "Options".
            former: names of earlier versions, such as "--equalise/--no-equalise".
            attributes: everything else that click takes.
        """
        super().__init__(param_decls, **attributes)
        self.group = group
        self._former = click.Option(["--unused", *former], **_flag(attributes)) if former else None

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        shown = self.opts, self.secondary_opts
        if self._former:
            self.opts = [*self.opts, *(name for name in self._former.opts if name != "--unused")]
            self.secondary_opts = [*self.secondary_opts, *self._former.secondary_opts]
        super().add_to_parser(parser, ctx)
        self.opts, self.secondary_opts = shown


def _flag(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: attributes[name] for name in ("is_flag", "multiple") if name in attributes}


class Command(click.Command):
    """A command that lists its options by group and turns our errors into messages and exit codes."""

    def __init__(self, name: str | None, **attributes: Any) -> None:
        super().__init__(name, **attributes)
        self.context_settings.setdefault("help_option_names", ["-h", "--help"])
        self.params += [
            _verbosity_option(["-q", "--quiet"], -1, "Show warnings, errors and results only."),
            _verbosity_option(["-v", "--verbose"], 1, "Show debug messages too."),
            version_option(),
        ]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"": [], _GENERAL: []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record:
                group = _GENERAL if param.opts[-1] in _GENERAL_NAMES else getattr(param, "group", "")
                groups.setdefault(group, []).append(record)
        general = groups.pop(_GENERAL)
        for title, records in (*groups.items(), (_GENERAL, general)):
            if records:
                with formatter.section(title or "Options"):
                    formatter.write_dl(records)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AdvPropError as error:
            click.echo(str(error) if isinstance(error, Interrupted) else f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("Interrupted. No incomplete file was left behind.", err=True)
            sys.exit(130)


def _verbosity_option(names: list[str], level: int, help_text: str) -> click.Option:
    def store(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            ctx.find_root().meta[_VERBOSITY] = level

    return click.Option(names, is_flag=True, expose_value=False, callback=store, help=help_text)


def version_option() -> click.Option:
    """Return --version, which prints the installed version of advprop."""

    def show(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            from importlib import metadata

            click.echo(f"advprop {metadata.version('advprop')}")
            ctx.exit()

    return click.Option(
        ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=show, help="Show the version and exit."
    )


def as_config(
    name: str, options: Sequence[click.Option], make: Callable[[dict[str, Any]], Any]
) -> Callable[[_Function], _Function]:
    """Return a decorator that adds options to a command, which receives them as one object.

    Args:
        name: the command's parameter for the object.
        options: the options.
        make: builds the object from the options' values by name. It may raise ConfigError.
    """
    names = [str(option.name) for option in options]

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def wrapped(**values: Any) -> Any:
            given = {key: values.pop(key) for key in names}
            return function(**{name: make(given)}, **values)

        # click reads a function's options in reverse order of their decorators.
        wrapped.__click_params__ = [*getattr(function, "__click_params__", []), *reversed(options)]  # type: ignore[attr-defined]
        return wrapped  # type: ignore[return-value]

    return decorate


class CommaList(click.ParamType, Generic[_Item]):  # type: ignore[type-arg]  # generic from click 8.4 on
    """Values separated by commas, as a tuple."""

    name = "list"

    def __init__(self, convert: Callable[[str], _Item] = str, expected: str = "") -> None:  # type: ignore[assignment]
        """
        Args:
            convert: turns one value's text into the value; raises ValueError if it can't.
            expected: what the message asks for, such as "whole numbers such as 1,8,32".
        """
        self._convert, self._expected = convert, expected

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[_Item, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._convert(part.strip()) for part in str(value).split(",") if part.strip())
        except ConfigError as error:
            self.fail(str(error), param, ctx)
        except ValueError:
            self.fail(f"expected {self._expected}; found {value!r}", param, ctx)


class _ImageSizes(click.ParamType):  # type: ignore[type-arg]
    """`N`, `HxW` or `MIN:OPT:MAX`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> ImageSizes:
        if isinstance(value, ImageSizes):
            return value
        try:
            return ImageSizes.parse(str(value))
        except ConfigError as error:
            self.fail(str(error), param, ctx)


def device_option(**attributes: Any) -> Callable[[_Function], _Function]:
    """Return --device, one of the devices that `runtime.load` accepts."""
    return click.option(
        "--device",
        cls=Option,
        default="auto",
        show_default=True,
        type=click.Choice(["auto", "cpu", "cuda"]),
        help="Device to run on; auto uses the GPU if a model can run there.",
        **attributes,
    )


def image_size_option(help_text: str, **attributes: Any) -> Callable[[_Function], _Function]:
    """Return --img-size."""
    return click.option(
        "--img-size", "image_sizes", cls=Option, type=_ImageSizes(), metavar="SIZE", help=help_text, **attributes
    )
