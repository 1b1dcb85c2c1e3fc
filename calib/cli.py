"""`advprop calibrate`: float32 ONNX classifier → INT8."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from runtime.console import cli_errors, set_up_logging

if TYPE_CHECKING:
    from calib.ptq import Calibrated

EXAMPLES = """\b
Examples:
  advprop calibrate model.onnx --data photos/                  model.int8.onnx beside it
  advprop calibrate model.onnx --data calib.json               the very images of an earlier run
  advprop calibrate model.onnx --data photos/ --method mse --keep node_conv2d_3
"""


@click.command("calibrate", epilog=EXAMPLES)
@click.argument("onnx", type=click.Path(path_type=Path))
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Real images such as the model will see, or the calib.json of an earlier run.",
)
@click.option(
    "--images", default=256, show_default=True, type=click.IntRange(min=1), help="Images to take of a folder."
)
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="[default: NAME.int8.onnx]")
@click.option(
    "--method",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "minmax", "percentile", "entropy", "mse"]),
    help="How thresholds are chosen; auto tries several for each tensor.",
)
@click.option("--bias-correction/--no-bias-correction", default=True, show_default=True, help="Correct channel means.")
@click.option("--keep", multiple=True, metavar="NODE", help="Keep this node in floating point. Repeatable.")
@click.option(
    "--rest",
    default="fp16",
    show_default=True,
    type=click.Choice(["fp16", "fp32"]),
    help="Precision of everything that is not INT8.",
)
@cli_errors
def main(
    onnx: Path,
    data: Path,
    images: int,
    out: Path | None,
    method: str,
    bias_correction: bool,
    keep: tuple[str, ...],
    rest: str,
) -> None:
    """Quantise the float32 classifier ONNX to INT8 by real images; the file must carry its preprocessing.

    Convolutions and matrix products become INT8, everything else FP16. Also written: calib.json, the
    images it was done with, and NAME.int8.json, each layer's threshold and error.
    """
    console = set_up_logging()
    from rich.progress import Progress

    from calib.pipeline import calibrate_file

    target = out or onnx.with_suffix(".int8.onnx")
    with Progress(console=console, transient=True) as bars:
        tasks = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        result = calibrate_file(
            onnx,
            data,
            target,
            images=images,
            method=method,
            correct_bias=bias_correction,
            keep=keep,
            half=rest == "fp16",
            progress=show,
        )
    calibrated: Calibrated = result.calibrated
    console.print(
        f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB): {calibrated.int8_share:.1%} of the MACs in INT8; "
        f"top-1 agreement with {onnx.name} on {result.parity_images} images {result.agreement:.1%}",
        highlight=False,
        soft_wrap=True,
    )
    for point in calibrated.points:
        if not point.int8:
            console.print(f"not INT8: {point.op} {point.node}: {point.reason}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
