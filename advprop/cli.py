"""The `advprop` command: a group that imports a subcommand only when it is called.

`advprop --help` needs nothing heavier than click, and a subcommand needs only the libraries that it
uses.
"""

from __future__ import annotations

import importlib

import click

from runtime.errors import nearest
from runtime.system.command import Group

COMMANDS = {
    "train": ("train.run:main", "Train a classifier with AdvProp."),
    "export": ("export.cli:main", "Export a checkpoint to ONNX and TensorRT (advprop-export)."),
    "calibrate": ("calib.cli:main", "Quantize a float32 ONNX classifier to INT8."),
    "convert": ("advprop.commands.convert:main", "Convert an ONNX file of another tool to an advprop file."),
    "build": ("advprop.commands.build:main", "Build a TensorRT engine from an ONNX file."),
    "predict": ("advprop.commands.predict:main", "Classify images with an exported model."),
    "serve": ("advprop.commands.serve:main", "Serve models over HTTP and gRPC (Open Inference Protocol)."),
    "bench": ("advprop.commands.bench:main", "Measure latency and throughput."),
    "eval": ("advprop.commands.evaluate:main", "Measure accuracy and robustness."),
    "eval-merge": ("advprop.commands.merge:main", "Merge the shards of an evaluation."),
    "attack": ("advprop.commands.attack:main", "Measure accuracy under attack: PGD, APGD, Square, noise."),
    "report": ("advprop.commands.report:main", "Build an HTML or Markdown report from results or a checkpoint."),
    "inspect": ("advprop.commands.inspect:main", "Describe a model file, checkpoint or engine."),
    "cache": ("advprop.commands.cache:main", "List and prune cached engines and histograms."),
    "doctor": ("advprop.commands.doctor:main", "Check which backends work here and how to fix the rest."),
}
"""Command → (module:attribute, one line of help)."""

EXAMPLES = """
Examples:
  advprop train --arch efficientnet_b3
  advprop export runs/efficientnet_b3/best.pt --trt fp16
  advprop predict runs/efficientnet_b3/model.fp16.onnx photo.jpg
"""


class LazyGroup(Group):
    """A group that imports a command when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no such command: {args[0]!r}; {nearest(args[0], COMMANDS)}".rstrip("; "))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, epilog=EXAMPLES)
def main() -> None:
    """Train robust image classifiers with AdvProp and deploy them as TensorRT engines."""


if __name__ == "__main__":
    main()
