"""`advprop build`: build a TensorRT engine from an ONNX file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from runtime.engine.command_line import ENGINE_OPTIONS, build_arguments
from runtime.errors import EngineBuildError
from runtime.graph.foreign import convert_command
from runtime.spec import ImageSizes
from runtime.system.command import Command, as_config, image_size_option, out_option, with_options
from runtime.system.console import engine_bar, print_lines, set_up_logging, status

EXAMPLES = """
Examples:
  advprop build model.fp16.onnx
  advprop build model.fp16.onnx --sm 86 --sm 89 --batch 1:16:64
  advprop build dynamic.onnx --img-size 160:224:320
  advprop build model.onnx --no-cache --workspace-mib 512
"""


@click.command("build", cls=Command, epilog=EXAMPLES)
@click.argument("onnx", type=click.Path(path_type=Path))
@with_options(
    out_option("Engine to write (default: the ONNX file's name with .engine).", "FILE"),
    image_size_option("Image sizes MIN:OPT:MAX of the engine, if the ONNX file accepts any size."),
)
@as_config("arguments", ENGINE_OPTIONS, build_arguments)
def main(onnx: Path, out: Path | None, image_sizes: ImageSizes | None, arguments: dict[str, Any]) -> None:
    """Build a TensorRT engine from the file ONNX, in the precision of its graph."""
    console = set_up_logging()
    from runtime.engine.build import build
    from runtime.engine.flavors import describe_targets
    from runtime.engine.int8 import summary_of
    from runtime.graph.summary import summarize

    arguments["options"] = dataclasses.replace(arguments["options"], image_sizes=image_sizes)
    try:
        with status("building") as spinner:
            info = build(onnx, out, progress=engine_bar(spinner), **arguments)
    except EngineBuildError as error:
        if error.fix or summarize(onnx).spec is not None:
            raise
        fix = f"convert the file, which rewrites it in a simpler form: {convert_command(onnx)}"
        raise EngineBuildError(error.message, fix=fix) from error
    engine = out or onnx.with_suffix(".engine")
    computed = f"; in INT8: {summary_of(info.layers)}" if info.layers else ""
    size, targets = engine.stat().st_size / 1e6, describe_targets(info.compute_capabilities)
    made = f"{info.flavor} {info.version}, {info.precision}, for {targets}{computed}"
    print_lines(console, [f"wrote {engine} ({size:.1f} MB): {made}"])


if __name__ == "__main__":
    main()
