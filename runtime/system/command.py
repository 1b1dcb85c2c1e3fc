"""Base classes and shared options of commands: grouped help, -h, -q, -v, errors and exit codes.

@click.command("bench", cls=Command, epilog=EXAMPLES)
@click.option("--rounds", cls=Option, group="Measurement", former=["--turns"], …)
def main(rounds: int) -> None: …
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import click

from runtime.errors import AdvPropError, ConfigError, Interrupted, nearest
from runtime.spec import ImageSizes
from runtime.system.console import VERBOSITY, clean
from runtime.system.help_page import MAX_WIDTH, write_notes
from runtime.system.slices import missing_package

__all__ = [
    "CommaList",
    "Command",
    "Group",
    "Option",
    "as_config",
    "batch_size_option",
    "data_option",
    "device_option",
    "image_size_option",
    "json_option",
    "kernels_option",
    "limit_option",
    "out_option",
    "seed_option",
    "threads_option",
    "version_option",
    "with_options",
    "workers_option",
]

_GENERAL = "General"
_GENERAL_NAMES = ("--quiet", "--verbose", "--version", "--help")
_METAVARS = {"integer": "N", "integer range": "N", "float": "X", "float range": "X", "text": "NAME"}
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": MAX_WIDTH}
_Item = TypeVar("_Item")
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Option(click.Option):
    """An option with a heading in the help page, and hidden former names that still work."""

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
            group: heading that the option is listed under (default: "Options").
            former: names in earlier versions, such as "--turns".
            attributes: other arguments of `click.Option`.
        """
        super().__init__(param_decls, **attributes)
        if self.metavar is None and self.type.name in _METAVARS:
            self.metavar = _METAVARS[self.type.name]
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


def _suggest_option(command: click.Command, ctx: click.Context, name: str, hint: str = "") -> NoReturn:
    """Raise UsageError for an unknown option, with `hint` or the nearest option of the command."""
    known = [option for param in command.get_params(ctx) for option in (*param.opts, *param.secondary_opts)]
    long = [option for option in known if option.startswith("--")]
    if len(name) == 2 and not hint:  # one letter, as other tools have it
        initial = [option for option in long if option[2] == name[1]]
        hint = f"did you mean {' or '.join(initial)}?" if initial else ""
    hint = hint or nearest(name, long, count=1)
    hint = hint or f"{ctx.command_path} --help lists all options"
    ctx.fail(f"no such option: {name}; {hint}")


class Group(click.Group):
    """A group of commands with -h, --version, suggestions, and notes that fit the terminal."""

    def __init__(self, name: str | None = None, **attributes: Any) -> None:
        attributes["params"] = [*attributes.get("params", ()), version_option()]
        super().__init__(name, **attributes)
        self.context_settings = {**_CONTEXT, **self.context_settings}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            command = next((name for name in args if name in self.list_commands(ctx)), "COMMAND")
            hint = f"options follow the command: {ctx.command_path} {command} {error.option_name}"
            _suggest_option(self, ctx, error.option_name, hint if command in args else "")

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            hint = nearest(args[0], known) or f"expected one of {', '.join(known)}"
            ctx.fail(f"no such command: {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_notes(formatter, self.epilog or "")


class Command(click.Command):
    """A command that lists its options by group, and converts errors to messages and exit codes."""

    slice = ""
    """The extra of advprop that the command needs; see `runtime.system.slices`."""

    def __init__(self, name: str | None, *, hints: Mapping[str, str] | None = None, **attributes: Any) -> None:
        """
        Args:
            name: as in click.
            hints: options of other tools, such as "--half" → how to get the same here.
            attributes: other arguments of `click.Command`.
        """
        super().__init__(name, **attributes)
        self._hints = dict(hints or {})
        self.context_settings = {**_CONTEXT, **self.context_settings}
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

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_notes(formatter, self.epilog or "")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            _suggest_option(self, ctx, error.option_name, self._hints.get(error.option_name, ""))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (AdvPropError, ImportError) as error:
            message, code = self._describe(error)
            if not message:
                raise
        except KeyboardInterrupt:
            message, code = "Interrupted. No incomplete file was left behind.", 130
        # Here and not in the handlers: the error holds the frames of the command, and whatever waits
        # for their objects to be freed, such as processes that load images, would wait forever.
        click.echo(message, err=True)
        sys.exit(code)

    def _describe(self, error: Exception) -> tuple[str, int]:
        """Return the message and the exit code of an error; an empty message if it is not ours."""
        shown = missing_package(error, self.slice) or missing_package(error.__cause__, self.slice) or error
        if not isinstance(shown, AdvPropError):
            return "", 1
        return clean(str(shown) if isinstance(shown, Interrupted) else f"error: {shown}"), shown.exit_code


def _verbosity_option(names: list[str], level: int, help_text: str) -> click.Option:
    def store(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            ctx.find_root().meta[VERBOSITY] = level

    return click.Option(names, is_flag=True, expose_value=False, callback=store, help=help_text)


def version_option() -> click.Option:
    """Return --version, which prints the installed version of advprop."""

    def show(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            from importlib import metadata

            try:
                version = metadata.version("advprop")
            except metadata.PackageNotFoundError:
                version = "(not installed, version unknown)"
            click.echo(f"advprop {version}")
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
        make: builds the object from a dict of the options' values. It may raise ConfigError.
    """
    names = [str(option.name) for option in options]

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def wrapped(**values: Any) -> Any:
            given = {key: values.pop(key) for key in names}
            return function(**{name: make(given)}, **values)

        return with_options(*options)(wrapped)  # type: ignore[return-value]

    return decorate


class CommaList(click.ParamType, Generic[_Item]):  # type: ignore[type-arg]  # generic from click 8.4 on
    """Values separated by commas, as a tuple."""

    name = "list"

    def __init__(self, convert: Callable[[str], _Item] = str, expected: str = "") -> None:  # type: ignore[assignment]
        """
        Args:
            convert: converts the text of one value; raises ValueError if the text is invalid.
            expected: description of valid input for the error message, such as
                "whole numbers such as 1,8,32".
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


def with_options(*options: click.Option) -> Callable[[_Function], _Function]:
    """Return a decorator that adds options to a command."""

    def decorate(function: _Function) -> _Function:
        # click reads a function's options in reverse order of their decorators.
        known = getattr(function, "__click_params__", [])
        function.__click_params__ = [*known, *reversed(options)]  # type: ignore[attr-defined]
        return function

    return decorate


def data_option(**attributes: Any) -> Option:
    """Return --data, a folder of labeled images."""
    shown = {"metavar": "DIR", "help": "Folder of labeled images, CLASS/IMAGE.", **attributes}
    return Option(["--data"], type=click.Path(path_type=Path), **shown)


def out_option(help_text: str, metavar: str = "DIR", **attributes: Any) -> Option:
    """Return --out, a folder or file to write."""
    if "default" in attributes:
        attributes["show_default"] = True
    return Option(["-o", "--out"], type=click.Path(path_type=Path), metavar=metavar, help=help_text, **attributes)


def json_option(content: str = "the result as JSON instead of a table") -> Option:
    """Return --json."""
    return Option(["--json", "as_json"], is_flag=True, help=f"Print {content}.")


def limit_option(unit: str = "images", **attributes: Any) -> Option:
    """Return --limit, a maximum number of images, stratified by class."""
    help_text = f"Maximum number of {unit}, stratified by class."
    return Option(["--limit"], type=click.IntRange(min=1), metavar="N", help=help_text, **attributes)


def seed_option(purpose: str, **attributes: Any) -> Option:
    """Return --seed."""
    return Option(["--seed"], default=0, show_default=True, help=f"Seed for {purpose}.", **attributes)


def batch_size_option(default: int, note: str = "", **attributes: Any) -> Option:
    """Return --batch-size, the number of images that a model processes at once."""
    size = click.IntRange(min=1)
    return Option(
        ["--batch-size"], default=default, show_default=True, type=size, help=f"Images per batch.{note}", **attributes
    )


def threads_option(help_text: str = "CPU threads of ONNX Runtime; 0 uses all cores.", **attributes: Any) -> Option:
    """Return --threads."""
    return Option(["--threads"], default=0, show_default=True, help=help_text, **attributes)


def workers_option(**attributes: Any) -> Option:
    """Return --workers, the number of processes that prepare images."""
    help_text = "Processes that decode and corrupt images (default: number of cores − 1, at most 8)."
    return Option(["--workers"], type=click.IntRange(min=0), help=help_text, **attributes)


def device_option(**attributes: Any) -> Option:
    """Return --device, one of the devices that `runtime.load` accepts."""
    return Option(
        ["--device"],
        default="auto",
        show_default=True,
        type=click.Choice(["auto", "cpu", "cuda"]),
        help="Device to run on; auto uses the GPU if the model can run there.",
        **attributes,
    )


def kernels_option(purpose: str, **attributes: Any) -> Option:
    """Return --gpu-kernels/--cpu-kernels, the arithmetic of ONNX files on a CPU."""
    help_text = f"On a CPU, round tensors as a GPU does (default), or {purpose} what a service on this CPU computes."
    return Option(["--gpu-kernels/--cpu-kernels"], default=True, help=help_text, **attributes)


def image_size_option(help_text: str, **attributes: Any) -> Option:
    """Return --img-size."""
    return Option(["--img-size", "image_sizes"], type=_ImageSizes(), metavar="SIZE", help=help_text, **attributes)
