"""`advprop build`: ONNX → TensorRT engine."""

from __future__ import annotations

from pathlib import Path

import click

from runtime.console import cli_errors, set_up_logging
from runtime.options import engine_options

EXAMPLES = """\b
Examples:
  advprop build model.fp16.onnx
  advprop build model.fp16.onnx --sm 86 --sm 89 --batch 1:16:64
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
@cli_errors
def main(
    onnx: Path, out: Path | None, sm: tuple[str, ...], batch: tuple[int, int, int], builder: str, verbose: bool
) -> None:
    """Build a TensorRT engine from ONNX, of the precision that the ONNX graph has."""
    console = set_up_logging(verbose)
    from runtime.engine.build import build
    from runtime.engine.flavours import parse_sm

    targets = [parse_sm(text) for text in sm]
    with console.status("building"):
        info = build(onnx, out, batch=batch, sm=targets, flavour=builder)
    engine = out or onnx.with_suffix(".engine")
    console.print(
        f"wrote {engine} ({engine.stat().st_size / 1e6:.1f} MB): {info.flavour} {info.version}, "
        f"{info.precision}, for {', '.join(info.compute_capabilities)}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
