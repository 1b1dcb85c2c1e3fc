"""`advprop convert`: describe the ONNX file of another tool, and reduce its precision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from runtime.graph.command_line import FOREIGN_OPTIONS, foreign_options
from runtime.graph.foreign import ForeignOptions
from runtime.system.command import Command, Option, as_config, data_option, out_option, with_options
from runtime.system.console import print_lines, set_up_logging

if TYPE_CHECKING:
    from export.convert import ConvertedFile

EXAMPLES = """
Examples:
  advprop convert net.onnx --img-size 224 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --classes labels.txt
  advprop convert keras.onnx --mean 0.5 --std 0.5 --classes imagenet_class_index.json --precision fp16 --data photos/
  advprop convert caffe.onnx --bgr --mean 0.485,0.458,0.408 --std 1/255 -o net.fp32.onnx
  advprop convert model.field.onnx --precision fp16 --data field/     a file of advprop adapt

The converted file contains all of this. build, calibrate, eval, bench, predict and runtime.load use it
like a file that advprop-export wrote.
"""


@click.command("convert", cls=Command, epilog=EXAMPLES)
@click.argument("onnx", type=click.Path(path_type=Path))
@with_options(
    out_option("File to write (default: NAME.PRECISION.onnx).", "FILE"),
    Option(
        ["--precision"],
        default="fp32",
        show_default=True,
        type=click.Choice(["fp32", "fp16", "bf16"]),
        help="Precision of the converted file. Its input and output stay float32.",
    ),
    data_option(
        metavar="PATH",
        help="Images on which FP16 or BF16 is compared with FP32. Nodes that overflow or lose accuracy stay in FP32.",
    ),
    Option(["--limit"], default=64, show_default=True, type=click.IntRange(min=1), help="Maximum number of images."),
)
@as_config("options", FOREIGN_OPTIONS, foreign_options)
def main(
    onnx: Path, out: Path | None, precision: str, data: Path | None, limit: int, options: ForeignOptions | None
) -> None:
    """Convert the float32 classifier ONNX, a file of another tool, to a file that describes itself.

    With --precision, it also reduces the precision of float32 files of advprop.

    The options describe how an image becomes the network's input. BatchNorms are folded, and old
    operator sets are converted.
    """
    console = set_up_logging()
    from export.convert import convert_file

    target = out or onnx.with_suffix(f".{precision}.onnx")
    result = convert_file(onnx, target, options or ForeignOptions(), precision=precision, data=data, images=limit)
    print_lines(console, _summary(result))


def _summary(result: ConvertedFile) -> list[str]:
    spec, size = result.spec, result.spec.preprocessing
    lines = [
        f"wrote {result.path}: {size.height}×{size.width} pixels, {len(spec.classes)} classes ({spec.classes[0]}, …), "
        f"output {spec.output_form}",
        *result.notes,
    ]
    if result.parity is not None:
        parity = result.parity
        lines.append(
            f"{parity.agreement:.1%} of {parity.images} images have the same top-1 class as in FP32; "
            f"{len(result.kept_fp32)} nodes stay in FP32"
        )
    return lines


if __name__ == "__main__":
    main()
