"""`advprop calibrate`: quantize a float32 ONNX classifier to INT8."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from calib.options import calibration_options
from runtime.graph.command_line import FOREIGN_OPTIONS, foreign_options
from runtime.system.command import Command, Option, as_config, data_option, out_option, with_options
from runtime.system.console import progress_bars, set_up_logging

if TYPE_CHECKING:
    from calib.config import CalibrationConfig
    from runtime.graph.foreign import ForeignOptions

EXAMPLES = """
Examples:
  advprop calibrate model.onnx --data photos/                  writes model.int8.onnx
  advprop calibrate model.onnx --data photos.tar --budget 0.5  loses at most half a point of top-1
  advprop calibrate model.onnx --data model.int8.calib.json    the images of an earlier run
  advprop calibrate model.onnx --data photos/ --calib-mix clean,corrupted
  advprop calibrate model.onnx --data photos/ --method mse --keep node_conv2d_3
  advprop calibrate other.onnx --data photos/ --img-size 224 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225
"""


@click.command("calibrate", cls=Command, epilog=EXAMPLES)
@click.argument("onnx", type=click.Path(path_type=Path))
@with_options(
    data_option(
        required=True,
        metavar="PATH",
        help="Images like those that the model will see: a folder, a tar or NumPy file, or a NAME.calib.json.",
    ),
    out_option("INT8 file to write (default: NAME.int8.onnx).", "FILE"),
    Option(["--no-cache"], is_flag=True, help="Do not read or write cached histograms."),
)
@calibration_options
@as_config("foreign", FOREIGN_OPTIONS, foreign_options)
def main(
    onnx: Path,
    data: Path,
    out: Path | None,
    no_cache: bool,
    calibration: CalibrationConfig,
    foreign: ForeignOptions | None,
) -> None:
    """Quantize the float32 classifier ONNX to INT8, with calibration images.

    Convolutions and matrix products become INT8, everything else FP16. The command also writes
    NAME.int8.calib.json (the images it used), NAME.int8.json (threshold and error of each layer),
    a plot of the ranges and, with --budget, a plot of accuracy against the share of work in INT8.
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

        result = calibrate_file(onnx, data, target, calibration, foreign=foreign, cache=not no_cache, progress=show)
    print_calibration(console, onnx.name, target, result)


if __name__ == "__main__":
    main()
