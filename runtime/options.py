"""Command-line options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from runtime.errors import ConfigError
from runtime.sizes import ImageSizes

__all__ = ["engine_options", "image_size_option"]

_Command = TypeVar("_Command", bound=Callable[..., Any])


class _BatchSizes(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """`min:opt:max`, or one number for all three."""

    name = "min:opt:max"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int, int]:
        if isinstance(value, tuple):
            return value
        try:
            sizes = [int(part) for part in str(value).split(":")]
            smallest, usual, largest = sizes * 3 if len(sizes) == 1 else sizes
        except ValueError:
            self.fail(f"expected MIN:OPT:MAX such as 1:8:32, or one number; found {value!r}", param, ctx)
        if not 1 <= smallest <= usual <= largest:
            self.fail(f"expected 1 ≤ min ≤ opt ≤ max; found {value!r}", param, ctx)
        return smallest, usual, largest


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


def image_size_option(help_text: str) -> Callable[[_Command], _Command]:
    """Makes --img-size."""
    return click.option("--img-size", "image_sizes", type=_ImageSizes(), metavar="SIZE", help=help_text)


def engine_options(command: _Command) -> _Command:
    """Adds --sm, --batch, --builder, --timing-cache and --verbose: what an engine build can be told."""
    options = (
        click.option(
            "--sm",
            multiple=True,
            metavar="SM",
            help="GPU generation the engine is for: 86, 8.9, sm_120. Repeatable (TensorRT-RTX).",
        ),
        click.option(
            "--batch", default="1:8:32", show_default=True, type=_BatchSizes(), help="The engine's batch sizes."
        ),
        click.option(
            "--builder",
            default="auto",
            show_default=True,
            type=click.Choice(["auto", "tensorrt", "tensorrt_rtx"]),
            help="Which TensorRT builds.",
        ),
        click.option(
            "--timing-cache",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Full TensorRT: kernel timings, read and written; a second build is quicker.",
        ),
        click.option("-v", "--verbose", is_flag=True, help="Show what the builder says."),
    )
    for option in reversed(options):
        command = option(command)
    return command
