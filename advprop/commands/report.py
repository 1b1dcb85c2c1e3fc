"""`advprop report`: build a report from results, or export and evaluate a checkpoint for it."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from runtime.system.command import (
    CommaList,
    Command,
    Option,
    batch_size_option,
    data_option,
    device_option,
    limit_option,
    seed_option,
    threads_option,
    with_options,
    workers_option,
)
from runtime.system.console import print_lines, set_up_logging, status

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES = """
Examples:
  advprop report evaluation/*.json -o report.html
  advprop report evaluation/*.json bench/*.batch1.json -o report.html -o report.md -o cells.csv
  advprop report --from best.pt --data photos/val --precisions fp32,fp16,int8 -o report.html
  advprop report --from best.pt --data photos/val --calib-data photos/train --limit 500 -o report.html

RESULTS are files that advprop eval wrote, for any models and suites; shards are merged. Latencies
(advprop.bench/1) and attacks (advprop.attack/1) may be among them; docs/how-to/report.md describes the formats.
With --from, INT8 is never calibrated on images that are evaluated. To resume, repeat the command.
"""

_FROM = "Exporting and evaluating a checkpoint"


def _from_option(*names: str, **attributes: Any) -> Option:
    return Option(list(names), group=_FROM, **attributes)


_FROM_OPTIONS = (
    _from_option(
        "--from",
        "checkpoint",
        type=click.Path(path_type=Path),
        metavar="CHECKPOINT",
        help="Checkpoint to export and evaluate; the other options of this group require it.",
    ),
    data_option(group=_FROM, help="Folder of the test set."),
    _from_option(
        "--precisions",
        default="fp32,fp16,int8",
        show_default=True,
        type=CommaList(str),
        metavar="LIST",
        help="Precisions to export: fp32, fp16, bf16, int8.",
    ),
    _from_option("--suite", default="corruptions", show_default=True, metavar="NAME", help="Test set to measure."),
    limit_option("images per cell", group=_FROM),
    seed_option("sampling and corruptions", group=_FROM),
    _from_option(
        "--calib-data",
        type=click.Path(path_type=Path),
        metavar="PATH",
        help="Images to calibrate INT8 on (default: images of --data that are not evaluated).",
    ),
    _from_option(
        "--calib-images",
        default=256,
        show_default=True,
        type=click.IntRange(min=1),
        help="Maximum number of calibration images.",
    ),
    _from_option(
        "--work",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Folder for models and results (default: the first output file without its suffix).",
    ),
    batch_size_option(8, group=_FROM),
    workers_option(group=_FROM),
    threads_option(group=_FROM),
    device_option(group=_FROM),
)


@click.command("report", cls=Command, epilog=EXAMPLES)
@click.argument("results", nargs=-1, type=click.Path(path_type=Path), metavar="[RESULTS]...")
@click.option(
    "-o",
    "--out",
    "outputs",
    cls=Option,
    former=["--output"],
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File to write: a page (.html), Markdown (.md) or the raw cells (.csv). Repeatable.",
)
@click.option("--title", cls=Option, default="", metavar="TEXT", help="Title (default: the models and datasets).")
@with_options(*_FROM_OPTIONS)
def main(
    results: tuple[Path, ...], outputs: tuple[Path, ...], title: str, checkpoint: Path | None, **options: Any
) -> None:
    """Build one report on the accuracy and robustness of models, from RESULTS or from a checkpoint.

    The HTML page is a single file that needs no network.
    """
    context = click.get_current_context()
    misplaced = [
        option.opts[-1]
        for option in context.command.params
        if option.name in options and context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
    ]
    if checkpoint is None and misplaced:
        raise click.UsageError(f"{misplaced[0]} requires --from CHECKPOINT")
    if checkpoint is None and not results:
        raise click.UsageError("expected results of advprop eval, or --from CHECKPOINT --data DIR")
    if checkpoint is not None and options["data"] is None:
        raise click.UsageError("--from requires --data DIR, a folder of labeled images (CLASS/IMAGE)")
    console = set_up_logging()
    from runtime.evaluate import check_outputs, write_report

    check_outputs(outputs)
    made = (
        [] if checkpoint is None else _results_from_checkpoint(console, checkpoint, outputs[0].with_suffix(""), options)
    )
    report = write_report([*results, *made], outputs, title=title, date=report_date())
    print_lines(console, (*report.gaps, f"wrote {', '.join(map(str, outputs))}"))


def report_date() -> str:
    """Return today's date, or the one of $SOURCE_DATE_EPOCH, such as "26 November 2026"."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH", "")
    if seconds.isdecimal():
        day = datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)
    else:
        day = datetime.datetime.now().astimezone()
    return f"{day.day} {day:%B %Y}"


def _results_from_checkpoint(console: Console, checkpoint: Path, folder: Path, options: dict[str, Any]) -> list[Path]:
    from runtime.evaluate import SuiteConfig

    names = ("precisions", "calib_data", "calib_images", "workers", "batch_size", "device", "threads")
    suite = SuiteConfig(name=options["suite"], data=options["data"], limit=options["limit"], seed=options["seed"])
    with status("importing torch") as spinner:
        from advprop.measure_checkpoint import MeasureConfig, measure_checkpoint

        config = MeasureConfig(suite=suite, folder=options["work"] or folder, **{name: options[name] for name in names})
        paths, description = measure_checkpoint(checkpoint, config, spinner.update)
    print_lines(console, filter(None, (description, f"models and results are in {config.folder}")))
    return paths


if __name__ == "__main__":
    main()
