"""`advprop calibrate`: float32 ONNX classifier → INT8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from calib.options import calibration_config, calibration_options
from runtime.spec import INTERPOLATIONS, Preprocessing
from runtime.system.console import cli_errors, counting_bars, set_up_logging

EXAMPLES = """\b
Examples:
  advprop calibrate model.onnx --data photos/                  model.int8.onnx beside it
  advprop calibrate model.onnx --data photos.tar --budget 0.5  at most half a point of top-1
  advprop calibrate model.onnx --data calib.json               the very images of an earlier run
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


@click.command("calibrate", epilog=EXAMPLES)
@click.argument("onnx", type=click.Path(path_type=Path))
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Real images such as the model will see: a folder, a tar or NumPy file, or a calib.json.",
)
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="[default: NAME.int8.onnx]")
@calibration_options
@click.option("--no-cache", is_flag=True, help="Keep no histograms for the next run.")
@click.option("--img-size", type=click.IntRange(min=1), metavar="N", help="Of a file without a spec: its input size.")
@click.option("--mean", type=_Triple(), metavar="R,G,B", help="Likewise: the mean of pixels in [0, 1].")
@click.option("--std", type=_Triple(), metavar="R,G,B", help="Likewise: their standard deviation.")
@click.option("--interpolation", type=click.Choice(INTERPOLATIONS), help="Likewise.  [default: bicubic]")
@click.option("--crop-pct", type=float, metavar="SHARE", help="Likewise: crop ÷ resized image.  [default: 0.875]")
@cli_errors
def main(
    onnx: Path,
    data: Path,
    out: Path | None,
    no_cache: bool,
    img_size: int | None,
    mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None,
    interpolation: str | None,
    crop_pct: float | None,
    **calibration: Any,
) -> None:
    """Quantize the float32 classifier ONNX to INT8 by real images.

    Convolutions and matrix products become INT8, everything else FP16. Also written: calib.json, the
    images it was done with; NAME.int8.json, each layer's threshold and error; and pictures of the ranges
    and, with --budget, of accuracy against the share in INT8.
    """
    console = set_up_logging()
    config = calibration_config(calibration)
    preprocessing = _preprocessing(img_size, mean, std, interpolation, crop_pct)
    from calib.pipeline import calibrate_file
    from calib.report import print_calibration

    target = out or onnx.with_suffix(".int8.onnx")
    with counting_bars(console) as bars:
        tasks = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total or None)
            bars.update(tasks[stage], completed=done)

        result = calibrate_file(
            onnx, data, target, config, preprocessing=preprocessing, cache=not no_cache, progress=show
        )
    print_calibration(console, onnx.name, target, result)


def _preprocessing(
    img_size: int | None,
    mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None,
    interpolation: str | None,
    crop_pct: float | None,
) -> Preprocessing | None:
    if (img_size, mean, std, interpolation, crop_pct) == (None,) * 5:
        return None
    if img_size is None or mean is None or std is None:
        raise click.UsageError("a file without a spec needs at least --img-size, --mean and --std")
    return Preprocessing(
        height=img_size,
        width=img_size,
        mean=mean,
        std=std,
        interpolation=interpolation or "bicubic",
        crop_pct=crop_pct or 0.875,
    )


if __name__ == "__main__":
    main()
