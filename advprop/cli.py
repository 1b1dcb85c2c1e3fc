"""The `advprop` command: a group that imports a subcommand only when it is called.

`advprop --help` needs nothing heavier than click, and a subcommand needs only the libraries that it
uses.
"""

from __future__ import annotations

import importlib

import click

from runtime.system.command import Command, Group

COMMANDS = {
    "train": ("train.run:main", "train", "Train a classifier with AdvProp."),
    "export": ("export.cli:main", "export", "Export a checkpoint to ONNX and TensorRT (advprop-export)."),
    "calibrate": ("calib.cli:main", "export", "Quantize a float32 ONNX classifier to INT8."),
    "convert": ("advprop.commands.convert:main", "export", "Convert an ONNX file of another tool to an advprop file."),
    "build": ("advprop.commands.build:main", "export", "Build a TensorRT engine from an ONNX file."),
    "export-triton": (
        "advprop.commands.export_triton:main",
        "export",
        "Write a model repository for Triton Inference Server.",
    ),
    "predict": ("advprop.commands.predict:main", "", "Classify images with an exported model."),
    "serve": ("advprop.commands.serve:main", "serve", "Serve models over HTTP and gRPC (Open Inference Protocol)."),
    "bench": ("advprop.commands.bench:main", "eval", "Measure latency and throughput."),
    "eval": ("advprop.commands.evaluate:main", "eval", "Measure accuracy and robustness."),
    "eval-merge": ("advprop.commands.merge:main", "eval", "Merge the shards of an evaluation."),
    "adapt": ("advprop.commands.adapt:main", "eval", "Adapt a model file to the images of the place where it runs."),
    "attack": ("advprop.commands.attack:main", "eval", "Measure accuracy under attack: PGD, APGD, Square, noise."),
    "compare": ("advprop.commands.compare:main", "eval", "Compare models on the same images; a gate for CI."),
    "report": ("advprop.commands.report:main", "eval", "Build a report (HTML, Markdown) from results or a checkpoint."),
    "inspect": ("advprop.commands.inspect:main", "", "Describe a model file, checkpoint or engine."),
    "cache": ("advprop.commands.cache:main", "", "List and prune cached engines and histograms."),
    "doctor": ("advprop.commands.doctor:main", "", "Check which backends work here and how to fix the rest."),
}
"""Command → (module:attribute, the extra that it needs, one line of help)."""

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
        if isinstance(command, Command):
            command.slice = COMMANDS[cmd_name][1]
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, epilog=EXAMPLES)
def main() -> None:
    """Train robust image classifiers with AdvProp and deploy them as TensorRT engines."""


if __name__ == "__main__":
    main()
