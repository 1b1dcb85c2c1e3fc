"""Command-line options of an engine build, for `advprop build` and `advprop-export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from runtime.engine.options import HARDWARE_LEVELS, BuildOptions
from runtime.system.command import Option

__all__ = ["ENGINE_OPTIONS", "build_arguments"]


class _BatchSizes(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """`min:opt:max`, or one number for all three."""

    name = "min:opt:max"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int, int]:
        if isinstance(value, tuple):
            return value
        try:
            sizes = [int(part) for part in str(value).split(":")]
            smallest, optimal, largest = sizes * 3 if len(sizes) == 1 else sizes
        except ValueError:
            self.fail(f"expected MIN:OPT:MAX such as 1:8:32, or one number; found {value!r}", param, ctx)
        if not 1 <= smallest <= optimal <= largest:
            self.fail(f"expected 1 ≤ min ≤ opt ≤ max; found {value!r}", param, ctx)
        return smallest, optimal, largest


def _option(*names: str, **attributes: Any) -> Option:
    return Option(list(names), group="Engine", **attributes)


ENGINE_OPTIONS = (
    _option(
        "--sm",
        multiple=True,
        metavar="SM",
        help="Target GPU generation: 86, 8.9, sm_120 (TensorRT-RTX). Repeatable.",
    ),
    _option(
        "--batch",
        default="1:8:32",
        show_default=True,
        type=_BatchSizes(),
        help="Smallest, optimal and largest batch size of the engine.",
    ),
    _option(
        "--builder",
        default="auto",
        show_default=True,
        type=click.Choice(["auto", "tensorrt", "tensorrt_rtx"]),
        help="Library that builds the engine; auto uses full TensorRT if it and a GPU are available.",
    ),
    _option(
        "--workspace-mib",
        type=click.IntRange(min=0),
        default=0,
        metavar="MIB",
        help="Maximum scratch memory, in MiB (default: TensorRT's own limit).",
    ),
    _option(
        "--version-compatible",
        is_flag=True,
        help="Full TensorRT: build an engine that later versions can load. It contains code for the CPU.",
    ),
    _option(
        "--hardware-compatible",
        type=click.Choice([level.replace("_", "-") for level in HARDWARE_LEVELS]),
        help="Full TensorRT: build an engine that also runs, more slowly, on other GPUs.",
    ),
    _option("--refit", is_flag=True, help="Build an engine whose weights can be replaced; not for INT8."),
    _option(
        "--strip-weights",
        is_flag=True,
        help="Build an engine without weights, which must be refitted before use; not for INT8.",
    ),
    _option(
        "--timing-cache",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Full TensorRT: file of kernel timings to read and update. It makes later builds faster.",
    ),
    _option("--no-cache", is_flag=True, help="Do not use the engine cache."),
)


def build_arguments(values: dict[str, Any]) -> dict[str, Any]:
    """Turn the values of ENGINE_OPTIONS into keyword arguments of `runtime.build`.

    Raises:
        ConfigError: a value is invalid.
    """
    from runtime.engine.flavors import parse_sm

    return {
        "sm": tuple(parse_sm(text) for text in values["sm"]),
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
