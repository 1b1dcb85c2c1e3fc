"""`advprop build`: ONNX → TensorRT engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from runtime.engine.command_line import build_arguments, engine_options, image_size_option
from runtime.spec import ImageSizes
from runtime.system.console import cli_errors, engine_bar, set_up_logging

EXAMPLES = """\b
Examples:
  advprop build model.fp16.onnx
  advprop build model.fp16.onnx --sm 86 --sm 89 --batch 1:16:64
  advprop build open.onnx --img-size 160:224:320          where the file leaves the size open
  advprop build model.onnx --no-cache --workspace-mib 512
"""


@click.command("build", epilog=EXAMPLES)
@click.argument("onnx", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The engine.  [default: the ONNX file's name, .engine]",
)
@engine_options
@image_size_option("MIN:OPT:MAX of a file whose image size is open.")
@cli_errors
def main(
    onnx: Path,
    out: Path | None,
    image_sizes: ImageSizes | None,
    verbose: bool,
    **engine_values: Any,
) -> None:
    """Build a TensorRT engine from ONNX, of the precision that the ONNX graph has."""
    console = set_up_logging(verbose)
    from runtime.engine.build import build
    from runtime.engine.int8 import summary_of

    arguments = build_arguments(engine_values)
    options = dataclasses.replace(arguments.pop("options"), image_sizes=image_sizes)
    with console.status("building") as status:
        info = build(onnx, out, options=options, progress=engine_bar(status), **arguments)
    engine = out or onnx.with_suffix(".engine")
    computed = f"; in INT8: {summary_of(info.layers)}" if info.layers else ""
    console.print(
        f"wrote {engine} ({engine.stat().st_size / 1e6:.1f} MB): {info.flavor} {info.version}, "
        f"{info.precision}, for {', '.join(info.compute_capabilities)}{computed}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
