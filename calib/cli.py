"""`advprop calibrate`: quantize a float32 ONNX classifier to INT8."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calib.options import calibration_options
from runtime.spec import INTERPOLATIONS, Preprocessing
from runtime.system.command import Command, Option, as_config, data_option, out_option, with_options
from runtime.system.console import progress_bars, set_up_logging

if TYPE_CHECKING:
    from calib.config import CalibrationConfig

EXAMPLES = """
Examples:
  advprop calibrate model.onnx --data photos/                  writes model.int8.onnx
  advprop calibrate model.onnx --data photos.tar --budget 0.5  loses at most half a point of top-1
  advprop calibrate model.onnx --data calib.json               the images of an earlier run
  advprop calibrate model.onnx --data photos/ --calib-mix clean,corrupted
  advprop calibrate model.onnx --data photos/ --method mse --keep node_conv2d_3
  advprop calibrate other.onnx --data photos/ --img-size 224 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225
"""


class _Triple(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """`R,G,B`."""

    name = "r,g,b"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, float, float]:
        if isinstance(value, tuple):
            return value
        try:
            red, green, blue = (float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"expected three numbers such as 0.485,0.456,0.406; found {value!r}", param, ctx)
        return red, green, blue


def _preprocessing_option(*names: str, **attributes: Any) -> Option:
    return Option(list(names), group="Preprocessing, for files that advprop did not write", **attributes)


_PREPROCESSING = (
    _preprocessing_option("--img-size", type=click.IntRange(min=1), metavar="N", help="Input size, in pixels."),
    _preprocessing_option("--mean", type=_Triple(), metavar="R,G,B", help="Mean of the pixels, which are in [0, 1]."),
    _preprocessing_option("--std", type=_Triple(), metavar="R,G,B", help="Standard deviation of the pixels."),
    _preprocessing_option(
        "--interpolation", type=click.Choice(INTERPOLATIONS), help="Filter for resizing (default: bicubic)."
    ),
    _preprocessing_option(
        "--crop-pct",
        type=float,
        metavar="SHARE",
        help="Crop size divided by the size of the resized image (default: 0.875).",
    ),
)


def _preprocessing(given: dict[str, Any]) -> Preprocessing | None:
    if all(value is None for value in given.values()):
        return None
    if given["img_size"] is None or given["mean"] is None or given["std"] is None:
        raise click.UsageError("a file without a spec needs at least --img-size, --mean and --std")
    return Preprocessing(
        height=given["img_size"],
        width=given["img_size"],
        mean=given["mean"],
        std=given["std"],
        interpolation=given["interpolation"] or "bicubic",
        crop_pct=given["crop_pct"] or 0.875,
        exif="upright",
    )


@click.command("calibrate", cls=Command, epilog=EXAMPLES)
@click.argument("onnx", type=click.Path(path_type=Path))
@with_options(
    data_option(
        required=True,
        metavar="PATH",
        help="Images like those that the model will see: a folder, a tar or NumPy file, or a calib.json.",
    ),
    out_option("INT8 file to write (default: NAME.int8.onnx).", "FILE"),
    Option(["--no-cache"], is_flag=True, help="Do not read or write cached histograms."),
)
@calibration_options
@as_config("preprocessing", _PREPROCESSING, _preprocessing)
def main(
    onnx: Path,
    data: Path,
    out: Path | None,
    no_cache: bool,
    calibration: CalibrationConfig,
    preprocessing: Preprocessing | None,
) -> None:
    """Quantize the float32 classifier ONNX to INT8, with calibration images.

    Convolutions and matrix products become INT8, everything else FP16. The command also writes
    calib.json (the images it used), NAME.int8.json (threshold and error of each layer), a plot of
    the ranges and, with --budget, a plot of accuracy against the share of work in INT8.
    """
    console = set_up_logging()
    from calib.pipeline import calibrate_file
    from calib.report import print_calibration

    target = out or onnx.with_suffix(".int8.onnx")
    with progress_bars() as bars:
        tasks = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total or None)
            bars.update(tasks[stage], completed=done)

        result = calibrate_file(
            onnx, data, target, calibration, preprocessing=preprocessing, cache=not no_cache, progress=show
        )
    print_calibration(console, onnx.name, target, result)


if __name__ == "__main__":
    main()
