"""`advprop-export`: checkpoint → ONNX → TensorRT engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from calib.options import OPTION_NAMES, calibration_config, calibration_options
from runtime.engine.command_line import ENGINE_OPTION_NAMES, build_arguments, engine_options, image_size_option
from runtime.spec import ImageSizes
from runtime.system.console import cli_errors, engine_bar, set_up_logging

if TYPE_CHECKING:
    from rich.console import Console

    from calib.precision import Decision
    from export.pipeline import ExportResult

EXAMPLES = """\b
Examples:
  advprop-export runs/resnet50/best.pt                       model.onnx
  advprop-export runs/resnet50/best.pt --trt fp16            + model.fp16.onnx and an engine
  advprop-export best.pt --trt fp16 --sm 86 --sm 89          for these GPU generations
  advprop-export best.pt --trt int8 --calib-data photos/     INT8 by real images, the rest FP16
  advprop-export best.pt --trt int8 --calib-data photos/ --budget 0.5 --calib-mix clean,adversarial
  advprop-export weights.pth --arch resnet50 --data photos/  a plain timm state dict
  advprop-export timm:tf_efficientnet_b3.ap_in1k --data photos/    published AdvProp weights
  advprop-export best.pt --input uint8-nhwc --output probs   pixels in, probabilities out
  advprop-export best.pt --img-size 160:224:320 --trt fp16   image size open, an engine for that range
  advprop-export best.pt --route adv --out adv/              an auxiliary BatchNorm, for study

\b
Exit codes: 0 done; 2 bad input; 3 no engine (the ONNX files are there);
            4 a stage does not agree with the one before.
"""


_PRECISIONS = ["fp32", "fp16", "bf16", "int8"]
_INPUT_FORMS = {"float32": "float32 NCHW", "uint8": "uint8 NCHW", "uint8-nhwc": "uint8 NHWC"}


@click.command("export", epilog=EXAMPLES)
@click.argument("checkpoint")
@click.option("--trt", type=click.Choice(_PRECISIONS), help="Also build a TensorRT engine of this precision.")
@click.option(
    "--precision", type=click.Choice(_PRECISIONS), help="ONNX files to write without an engine.  [default: fp32]"
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Where files go.  [default: beside the checkpoint]"
)
@engine_options
@click.option(
    "--input",
    "input_form",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "uint8", "uint8-nhwc"]),
    help="Normalized floats, or pixels at the network's size that the file normalizes itself.",
)
@click.option(
    "--output",
    "output_form",
    default="logits",
    show_default=True,
    type=click.Choice(["logits", "probs", "topk"]),
    help="What the file gives; topk: the five largest probabilities and their classes.",
)
@click.option(
    "--io",
    default="fp32",
    show_default=True,
    type=click.Choice(["fp32", "fp16"]),
    help="Floats that the FP16 file takes and gives.",
)
@image_size_option("N or HxW instead of the checkpoint's; MIN:OPT:MAX leaves the size open.")
@click.option("--arch", metavar="NAME", help="timm's name, for a plain state dict.")
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Weights of timm:NAME.  [default: timm downloads them]",
)
@click.option("--route", default="main", show_default=True, metavar="NAME", help="BatchNorm route to export.")
@click.option("--no-ema", is_flag=True, help="Export the weights themselves, not their moving average.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Images to verify on.  [default: the checkpoint's own sample]",
)
@click.option(
    "--calib-data",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="INT8: images to calibrate on (a folder, tar or NumPy file), or the calib.json of an earlier run.",
)
@calibration_options
@click.option(
    "--bisect/--no-bisect",
    default=True,
    show_default=True,
    help="Where a file does not agree, find the first layer that does not.",
)
@cli_errors
def main(
    checkpoint: str,
    trt: str | None,
    precision: str | None,
    out: Path | None,
    input_form: str,
    output_form: str,
    io: str,
    image_sizes: ImageSizes | None,
    arch: str | None,
    weights: Path | None,
    route: str,
    no_ema: bool,
    data: Path | None,
    calib_data: Path | None,
    bisect: bool,
    verbose: bool,
    **others: Any,
) -> None:
    """Export CHECKPOINT as ONNX and, with --trt, as a TensorRT engine.

    The auxiliary BatchNorms are dropped, the main ones folded; preprocessing and class
    names go into the file; each ONNX file is verified on real images.
    """
    console = set_up_logging(verbose)
    if trt and precision and trt != precision:
        raise click.UsageError(f"--trt {trt} makes {trt} files; leave --precision {precision} out")
    given = click.get_current_context().get_parameter_source
    for name in ENGINE_OPTION_NAMES:
        if not trt and given(name) is ParameterSource.COMMANDLINE:
            option = name.replace("_", "-")
            raise click.UsageError(f"--{option} says how an engine is built; give --trt fp16 too")
    if io == "fp16" and (trt or precision) != "fp16":
        raise click.UsageError("--io fp16 is of FP16 files; give --trt fp16 or --precision fp16 too")
    wished = [name for name in OPTION_NAMES if given(name) is ParameterSource.COMMANDLINE]
    if wished and (trt or precision) != "int8":
        option = wished[0].replace("_", "-")
        raise click.UsageError(f"--{option} is of INT8 files; give --trt int8 or --precision int8 too")
    engine = build_arguments({name: others.pop(name) for name in ENGINE_OPTION_NAMES})
    with console.status("importing torch") as status:
        from export.pipeline import export_checkpoint

        result = export_checkpoint(
            checkpoint,
            out=out,
            precision=trt or precision or "fp32",
            engine=trt is not None,
            batch=engine["batch"],
            sm=engine["sm"],
            flavor=engine["flavor"],
            build_options=engine["options"],
            cache=engine["cache"],
            input_form=_INPUT_FORMS[input_form],
            output_form=output_form,
            io=io,
            sizes=image_sizes,
            calib_data=calib_data,
            calibration=calibration_config(others),
            bisect=bisect,
            arch=arch,
            weights=weights,
            bn=route,
            ema=not no_ema,
            data=data,
            progress=status.update,
            build_progress=engine_bar(status),
        )
    _show(console, result)


def _show(console: Console, result: ExportResult) -> None:
    from rich.table import Table

    table = Table()
    table.add_column("file", no_wrap=True)
    for heading in ("MB", "against", "max |Δlogit|", "top-1", "KL"):
        table.add_column(heading, no_wrap=True, justify="right")
    rows = (
        (result.onnx, "checkpoint", result.onnx_parity),
        (result.reduced_onnx, result.onnx.name, result.reduced_parity),
        (result.engine, "", None),
    )
    for path, against, parity in rows:
        if path is None:
            continue
        size = f"{_bytes(path) / 1e6:.1f}"
        if parity is None:
            table.add_row(path.name, size, "built", "", "", "")
        else:
            table.add_row(
                path.name, size, against, f"{parity.max_abs:.1e}", f"{parity.agreement:.1%}", f"{parity.kl:.1e}"
            )
    console.print(table)
    console.print(
        f"verified on {result.onnx_parity.images} real images; files in {result.onnx.parent}",
        highlight=False,
        soft_wrap=True,
    )
    if result.calibrated and result.reduced_onnx:
        from calib.report import print_calibration

        print_calibration(console, result.onnx.name, result.reduced_onnx, result.calibrated)
    for decision in result.kept_fp32:
        console.print(
            f"kept in FP32: {decision.op} {decision.node}: {_reason(decision)}",
            highlight=False,
        )
    if result.engine_info:
        info = result.engine_info
        targets = ", ".join(info.compute_capabilities)
        console.print(f"engine: {info.flavor} {info.version}, {info.precision}, for {targets}", highlight=False)


def _bytes(path: Path) -> int:
    """Of a file, with the weights beside it where they are too large for it."""
    beside = path.with_name(path.name + ".data")
    return path.stat().st_size + (beside.stat().st_size if beside.exists() else 0)


def _reason(decision: Decision) -> str:
    if decision.reason == "overflow":
        return f"{decision.tensor} reaches {decision.amax:.3g}"
    return f"{decision.tensor} would be off by {decision.error:.1%}"


if __name__ == "__main__":
    main()
