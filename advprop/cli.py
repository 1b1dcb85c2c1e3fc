"""The `advprop` command: a group whose subcommands are imported when they are called.

`advprop --help` therefore needs click and nothing heavier, and a command works wherever
the libraries that it itself uses are installed.
"""

from __future__ import annotations

import importlib

import click

from runtime.errors import nearest

COMMANDS = {
    "train": ("train.run:main", "Train a classifier with AdvProp."),
    "export": ("export.cli:main", "Checkpoint → ONNX → TensorRT engine (advprop-export)."),
    "calibrate": ("calib.cli:main", "Float32 ONNX → INT8, by real images."),
    "build": ("advprop.commands.build:main", "ONNX → TensorRT engine."),
    "predict": ("advprop.commands.predict:main", "Classify images with an exported model."),
    "bench": ("advprop.commands.bench:main", "Measure latency and throughput."),
    "eval": ("advprop.commands.evaluate:main", "Measure accuracy and robustness."),
    "eval-merge": ("advprop.commands.merge:main", "Put the parts of an evaluation together."),
    "attack": ("advprop.commands.attack:main", "Measure accuracy under attack: PGD, APGD, Square, noise."),
    "report": ("advprop.commands.report:main", "Results, or a checkpoint, as a page."),
    "inspect": ("advprop.commands.inspect:main", "Say what a model file or engine is."),
    "cache": ("advprop.commands.cache:main", "List what is cached, and make room."),
    "doctor": ("advprop.commands.doctor:main", "Say which backends work here, and what mends the others."),
}
"""Command → (module:attribute, one line of help)."""

EXAMPLES = """\b
Examples:
  advprop train --arch efficientnet_b3
  advprop export runs/efficientnet_b3/best.pt --trt fp16
  advprop predict runs/efficientnet_b3/model.fp16.onnx photo.jpg
"""


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one when it is used."""

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
            ctx.fail(f"no command {args[0]!r}. {nearest(args[0], COMMANDS)}".rstrip())
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, epilog=EXAMPLES)
@click.version_option(package_name="advprop")
def main() -> None:
    """From images to a robust classifier in a TensorRT engine."""


if __name__ == "__main__":
    main()
