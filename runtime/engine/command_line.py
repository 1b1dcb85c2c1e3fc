"""Command-line options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from runtime.engine.options import HARDWARE_LEVELS, BuildOptions
from runtime.errors import ConfigError
from runtime.spec import ImageSizes

__all__ = [
    "ENGINE_OPTION_NAMES",
    "build_arguments",
    "cpu_kernels_option",
    "device_option",
    "engine_options",
    "image_size_option",
]

ENGINE_OPTION_NAMES = (
    "sm",
    "batch",
    "builder",
    "workspace_mib",
    "version_compatible",
    "hardware_compatible",
    "refit",
    "strip_weights",
    "timing_cache",
    "no_cache",
)
"""What `engine_options` adds, --verbose aside."""

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


def device_option(help_text: str) -> Callable[[_Command], _Command]:
    """Makes --device, of whatever `runtime.load` runs."""
    choice = click.Choice(["auto", "cpu", "cuda"])
    return click.option("--device", default="auto", show_default=True, type=choice, help=help_text)


cpu_kernels_option = click.option(
    "--cpu-kernels", is_flag=True, help="On a CPU, do not compute as a GPU rounds, but as services here do."
)
"""Makes --cpu-kernels, of evaluations and attacks."""


def image_size_option(help_text: str) -> Callable[[_Command], _Command]:
    """Makes --img-size."""
    return click.option("--img-size", "image_sizes", type=_ImageSizes(), metavar="SIZE", help=help_text)


def build_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turns the values of `engine_options` into keyword arguments of `runtime.build`.

    Raises:
        ConfigError: impossible values.
    """
    from runtime.engine.flavors import parse_sm

    return {
        "sm": [parse_sm(text) for text in values["sm"]],
        "batch": values["batch"],
        "flavor": values["builder"],
        "cache": not values["no_cache"],
        "options": BuildOptions(
            workspace_mib=values["workspace_mib"],
            timing_cache=values["timing_cache"],
            version_compatible=values["version_compatible"],
            hardware_compatible=(values["hardware_compatible"] or "").replace("-", "_"),
            refit=values["refit"],
            strip_weights=values["strip_weights"],
        ),
    }


def engine_options(command: _Command) -> _Command:
    """Adds what an engine build can be told (`ENGINE_OPTION_NAMES`), and --verbose."""
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
            "--workspace-mib",
            type=click.IntRange(min=0),
            default=0,
            metavar="MIB",
            help="Most scratch memory of builder and engine.  [default: TensorRT's own limit]",
        ),
        click.option(
            "--version-compatible",
            is_flag=True,
            help="Full TensorRT: loads in later versions too; such an engine carries code for the CPU.",
        ),
        click.option(
            "--hardware-compatible",
            type=click.Choice([level.replace("_", "-") for level in HARDWARE_LEVELS]),
            help="Full TensorRT: runs on more GPUs than the one at hand, and slower.",
        ),
        click.option("--refit", is_flag=True, help="Weights can be replaced in the engine; not for INT8."),
        click.option("--strip-weights", is_flag=True, help="Engine without weights, to be refitted; not for INT8."),
        click.option(
            "--timing-cache",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Full TensorRT: kernel timings, read and written; a second build is quicker.",
        ),
        click.option("--no-cache", is_flag=True, help="Build even what `advprop cache` has, and do not keep it."),
        click.option("-v", "--verbose", is_flag=True, help="Show what the builder says."),
    )
    for option in reversed(options):
        command = option(command)
    return command
