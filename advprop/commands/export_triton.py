"""`advprop export-triton`: write a model repository for Triton Inference Server."""

from __future__ import annotations

from pathlib import Path

import click

from runtime.errors import ConfigError
from runtime.system.command import CommaList, Command, Option, with_options
from runtime.system.console import print_lines, set_up_logging

EXAMPLES = """
Examples:
  advprop export-triton models/ runs/resnet50/model.onnx
  advprop export-triton models/ cats=cats.fp16.onnx dogs=dogs.fp16.onnx --max-batch 64
  # engines of full TensorRT for two GPU generations
  advprop export-triton models/ cats=sm86/model.fp16.engine,sm89/model.fp16.engine
"""


@click.command("export-triton", cls=Command, epilog=EXAMPLES)
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@with_options(
    Option(["--max-batch"], default=32, show_default=True, help="Largest batch of files with an open batch size."),
    Option(["--max-delay-us"], default=500, show_default=True, help="Microseconds that a request waits for others."),
    Option(["--max-queue"], default=1024, show_default=True, help="Maximum number of waiting requests."),
    Option(
        ["--timeout-us"],
        default=1_000_000,
        show_default=True,
        help="Microseconds after which a waiting request is rejected.",
    ),
    Option(["--instances"], default=1, show_default=True, help="Instances of each classifier per GPU."),
    Option(["--preprocess-instances"], default=2, show_default=True, help="Processes that decode and resize images."),
    Option(["--gpus"], default="", type=CommaList(int), metavar="IDS", help="GPUs to run on (default: all)."),
    Option(["--cpu"], is_flag=True, help="Run the classifiers on the CPU."),
    Option(["--top-k"], default=5, show_default=True, help="Number of labels that an ensemble returns."),
)
def main(folder: Path, models: tuple[str, ...], **options: int | tuple[int, ...]) -> None:
    """Write the Triton model repository DIR with one or more MODELs.

    A MODEL is FILE or NAME=FILE, with an ONNX file, or engines of full TensorRT separated by commas.
    For each, an ensemble NAME_image takes encoded images and returns labels.
    """
    console = set_up_logging()
    from export.triton.repository import RepositoryOptions, write_repository

    written = write_repository(folder, [_parse(model) for model in models], RepositoryOptions(**options))  # type: ignore[arg-type]
    print_lines(
        console, [f"wrote {', '.join(written)} to {folder}; {folder / 'README.md'} says how to start the server"]
    )


def _parse(model: str) -> tuple[str, list[Path]]:
    name, separator, files = model.partition("=")
    paths = [Path(file) for file in (files if separator else name).split(",") if file]
    if not paths or not (name if separator else paths[0].stem):
        raise ConfigError(f"expected FILE, NAME=FILE or NAME=ENGINE,ENGINE; found {model!r}")
    return (name if separator else paths[0].name.split(".")[0]), paths
