"""`advprop-export`: checkpoint → ONNX → TensorRT engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from runtime.console import cli_errors, set_up_logging
from runtime.errors import BackendUnavailable, EngineBuildError
from runtime.options import engine_options

if TYPE_CHECKING:
    from rich.console import Console

    from export.pipeline import ExportResult

EXAMPLES = """\b
Examples:
  advprop-export runs/resnet50/best.pt                       model.onnx
  advprop-export runs/resnet50/best.pt --trt fp16            + model.fp16.onnx and an engine
  advprop-export best.pt --trt fp16 --sm 86 --sm 89          for these GPU generations
  advprop-export weights.pth --arch resnet50 --data photos/  a plain timm state dict

\b
Exit codes: 0 done; 2 bad input; 3 no engine (the ONNX files are there);
            4 a stage does not agree with the one before.
"""


@click.command("export", epilog=EXAMPLES)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--trt", type=click.Choice(["fp32", "fp16"]), help="Also build a TensorRT engine of this precision.")
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16"]), help="ONNX files to write without an engine.  [default: fp32]"
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Where files go.  [default: beside the checkpoint]"
)
@engine_options
@click.option("--arch", metavar="NAME", help="timm's name, for a plain state dict.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Images to verify on.  [default: the checkpoint's own sample]",
)
@cli_errors
def main(
    checkpoint: Path,
    trt: str | None,
    precision: str | None,
    out: Path | None,
    sm: tuple[str, ...],
    batch: tuple[int, int, int],
    builder: str,
    arch: str | None,
    data: Path | None,
    verbose: bool,
) -> None:
    """Export CHECKPOINT as ONNX and, with --trt, as a TensorRT engine.

    The auxiliary BatchNorms are dropped, the main ones folded; preprocessing and class
    names go into the file; each ONNX file is verified on real images.
    """
    console = set_up_logging(verbose)
    if trt and precision and trt != precision:
        raise click.UsageError(f"--trt {trt} makes {trt} files; leave --precision {precision} out")
    given = click.get_current_context().get_parameter_source
    for name in ("sm", "batch", "builder"):
        if not trt and given(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} says how an engine is built; give --trt fp16 too")
    from runtime.engine.flavours import parse_sm

    targets = [parse_sm(text) for text in sm]
    with console.status("importing torch") as status:
        from export.pipeline import export_checkpoint

        try:
            result = export_checkpoint(
                checkpoint,
                out=out,
                precision=trt or precision or "fp32",
                engine=trt is not None,
                batch=batch,
                sm=targets,
                flavour=builder,
                arch=arch,
                data=data,
                progress=status.update,
            )
        except (BackendUnavailable, EngineBuildError) as error:
            status.stop()
            click.echo(f"error: {error}\nThe ONNX files are whole, in {out or checkpoint.parent}.", err=True)
            sys.exit(error.exit_code)
    _show(console, result)


def _show(console: Console, result: ExportResult) -> None:
    from rich.table import Table

    table = Table()
    table.add_column("file", no_wrap=True)
    for heading in ("MB", "against", "max |Δlogit|", "top-1", "KL"):
        table.add_column(heading, no_wrap=True, justify="right")
    rows = (
        (result.onnx, "checkpoint", result.onnx_parity),
        (result.fp16_onnx, result.onnx.name, result.fp16_parity),
        (result.engine, "", None),
    )
    for path, against, parity in rows:
        if path is None:
            continue
        size = f"{path.stat().st_size / 1e6:.1f}"
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
    for decision in result.kept_fp32:
        console.print(
            f"kept in FP32: {decision.op} {decision.node}: {decision.tensor} reaches {decision.amax:.3g}",
            highlight=False,
        )
    if result.engine_info:
        info = result.engine_info
        targets = ", ".join(info.compute_capabilities)
        console.print(f"engine: {info.flavour} {info.version}, {info.precision}, for {targets}", highlight=False)


if __name__ == "__main__":
    main()
