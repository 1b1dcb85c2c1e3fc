"""`advprop build`: ONNX → TensorRT engine."""

from __future__ import annotations

from pathlib import Path

import click

from runtime.console import cli_errors, set_up_logging
from runtime.options import engine_options, image_size_option
from runtime.sizes import ImageSizes

EXAMPLES = """\b
Examples:
  advprop build model.fp16.onnx
  advprop build model.fp16.onnx --sm 86 --sm 89 --batch 1:16:64
  advprop build open.onnx --img-size 160:224:320          where the file leaves the size open
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
    sm: tuple[str, ...],
    batch: tuple[int, int, int],
    builder: str,
    timing_cache: Path | None,
    image_sizes: ImageSizes | None,
    verbose: bool,
) -> None:
    """Build a TensorRT engine from ONNX, of the precision that the ONNX graph has."""
    console = set_up_logging(verbose)
    from runtime.engine.build import build
    from runtime.engine.flavours import parse_sm
    from runtime.engine.int8 import summary_of

    targets = [parse_sm(text) for text in sm]
    with console.status("building"):
        info = build(onnx, out, batch=batch, sizes=image_sizes, sm=targets, flavour=builder, timing_cache=timing_cache)
    engine = out or onnx.with_suffix(".engine")
    computed = f"; in INT8: {summary_of(info.layers)}" if info.layers else ""
    console.print(
        f"wrote {engine} ({engine.stat().st_size / 1e6:.1f} MB): {info.flavour} {info.version}, "
        f"{info.precision}, for {', '.join(info.compute_capabilities)}{computed}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
