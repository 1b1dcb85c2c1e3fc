"""Command-line options for ONNX files of other tools, for `advprop convert` and `calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from runtime.graph.foreign import LAYOUTS, ForeignOptions, read_classes
from runtime.spec import CROP_MODES, INTERPOLATIONS
from runtime.system.command import Option, image_size_option

__all__ = ["FOREIGN_OPTIONS", "foreign_options"]

_GROUP = "Files of other tools"
_DEFAULTS = ForeignOptions()


class _Triple(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """`R,G,B`, or one number for all three. A number can be a fraction."""

    name = "r,g,b"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, float, float]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = [_number(part) for part in str(value).split(",")]
            red, green, blue = numbers * 3 if len(numbers) == 1 else numbers
        except (ValueError, ZeroDivisionError):
            self.fail(f"expected three numbers such as 0.485,0.456,0.406, or one; found {value!r}", param, ctx)
        return red, green, blue


def _number(text: str) -> float:
    numerator, _, denominator = text.partition("/")
    return float(numerator) / float(denominator or 1)


def _option(*names: str, **attributes: Any) -> Option:
    return Option(list(names), group=_GROUP, **attributes)


FOREIGN_OPTIONS = (
    image_size_option("Input size N or HxW, or a range MIN:OPT:MAX (default: the size in the file).", group=_GROUP),
    _option("--mean", type=_Triple(), metavar="R,G,B", help="Mean of the pixels, which are in [0, 1]."),
    _option(
        "--std",
        type=_Triple(),
        metavar="R,G,B",
        help="Standard deviation of the pixels, which are in [0, 1]. For a network that expects pixels from 0 to "
        "255: --mean 0 --std 1/255.",
    ),
    _option(
        "--interpolation", type=click.Choice(INTERPOLATIONS), help="Filter for resizing images (default: bicubic)."
    ),
    _option(
        "--crop-pct",
        type=click.FloatRange(0, 2, min_open=True),
        metavar="SHARE",
        help="Crop size divided by the size of the resized image (default: 0.875).",
    ),
    _option(
        "--crop-mode",
        type=click.Choice(CROP_MODES),
        help="center crops the resized image, squash changes its aspect ratio, border pads it (default: center).",
    ),
    _option(
        "--layout",
        type=click.Choice(LAYOUTS, case_sensitive=False),
        help="Position of the input's channels (default: the dimension of size 3).",
    ),
    _option("--bgr", is_flag=True, help="Feed the channels in the order blue, green, red, as networks of Caffe need."),
    _option(
        "--classes",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Class names: one per line, or JSON (default: numbers).",
    ),
    _option("--output", metavar="NAME", help="Output with the logits or probabilities, if the file has several."),
)


def foreign_options(given: dict[str, Any]) -> ForeignOptions | None:
    """Return the options as a ForeignOptions; None if none of them is given."""
    if all(value is None or value is False for value in given.values()):
        return None
    classes, wnids = read_classes(given["classes"]) if given["classes"] else ((), ())
    return ForeignOptions(
        image_sizes=given["image_sizes"],
        mean=given["mean"],
        std=given["std"],
        interpolation=given["interpolation"] or _DEFAULTS.interpolation,
        crop_pct=_DEFAULTS.crop_pct if given["crop_pct"] is None else given["crop_pct"],
        crop_mode=given["crop_mode"] or _DEFAULTS.crop_mode,
        layout=given["layout"],
        bgr=given["bgr"],
        classes=classes,
        wnids=wnids,
        output=given["output"],
    )
