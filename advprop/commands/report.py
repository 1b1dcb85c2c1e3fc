"""`advprop report`: results as a page, or the whole way from a checkpoint to that page.

It lives here because the second form exports and calibrates, which `runtime` may not.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from runtime.engine.command_line import device_option
from runtime.system.console import cli_errors, set_up_logging

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES = """\b
Examples:
  advprop report evaluation/*.json -o report.html
  advprop report evaluation/*.json bench/*.batch1.json -o report.html -o report.md -o cells.csv
  advprop report --from best.pt --data photos/val --precisions fp32,fp16,int8 -o report.html
  advprop report --from best.pt --data photos/val --calib-data photos/train --limit 500 -o report.html

\b
RESULTS are what advprop eval wrote, of any models and suites; shards of one are put together. Latencies
(advprop.bench/1) and attacks (advprop.attack/1) may be among them; docs/evaluation.md has their formats.
--from: INT8 is never calibrated on images that are evaluated. The same command goes on where it was stopped.
"""

_OF_FROM = (
    *("data", "precisions", "suite", "limit", "seed", "calib_data", "calib_images", "work"),
    *("workers", "batch_size", "threads", "device"),
)
"""Options that say something with --from only."""


@click.command("report", epilog=EXAMPLES)
@click.argument("results", nargs=-1, type=click.Path(path_type=Path), metavar="[RESULTS]...")
@click.option(
    "-o",
    "--output",
    "outputs",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What to write: a page (.html), Markdown (.md), the raw cells (.csv). Repeatable.",
)
@click.option("--from", "checkpoint", type=click.Path(path_type=Path), metavar="CKPT", help="Make the results first.")
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", help="--from: the suite's folder.")
@click.option(
    "--precisions", default="fp32,fp16,int8", show_default=True, metavar="LIST", help="--from: files to make."
)
@click.option("--suite", default="corruptions", show_default=True, metavar="NAME", help="--from: the test set.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="--from: images a cell, of all classes.")
@click.option("--seed", default=0, show_default=True, help="--from: of the limit and of corruptions.")
@click.option(
    "--calib-data",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="--from: INT8's calibration images.  [default: images of --data that are not evaluated]",
)
@click.option("--calib-images", default=256, show_default=True, type=click.IntRange(min=1), help="--from: the most.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="--from: where files and results go.  [default: the first FILE without its ending]",
)
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(min=1), help="--from: images at once.")
@click.option("--workers", type=click.IntRange(min=0), help="--from: processes that corrupt.  [default: cores − 1]")
@click.option("--threads", default=0, show_default=True, help="--from: CPU threads of ONNX Runtime; 0: all cores.")
@device_option("--from: where models run.")
@cli_errors
def main(results: tuple[Path, ...], outputs: tuple[Path, ...], checkpoint: Path | None, **options: Any) -> None:
    """Make one page of RESULTS, or of a checkpoint: how accurate and robust each precision is.

    The page needs no network: it can be mailed, archived and opened anywhere.
    """
    given = click.get_current_context().get_parameter_source
    misplaced = [name for name in _OF_FROM if given(name) is ParameterSource.COMMANDLINE]
    if checkpoint is None and misplaced:
        raise click.UsageError(f"--{misplaced[0].replace('_', '-')} goes with --from CKPT")
    if checkpoint is None and not results:
        raise click.UsageError("give results of advprop eval, or --from CKPT --data DIR")
    if checkpoint is not None and options["data"] is None:
        raise click.UsageError("--from needs --data DIR: labeled images, CLASS/IMAGE")
    console = set_up_logging()
    from runtime.evaluate import check_outputs, write_report

    check_outputs(outputs)
    made = [] if checkpoint is None else _make(console, checkpoint, outputs[0].with_suffix(""), options)
    report = write_report([*results, *made], outputs)
    for line in (*report.gaps, f"wrote {', '.join(map(str, outputs))}"):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _make(console: Console, checkpoint: Path, folder: Path, options: dict[str, Any]) -> list[Path]:
    from runtime.evaluate import SuiteConfig

    suite = SuiteConfig(name=options["suite"], data=options["data"], limit=options["limit"], seed=options["seed"])
    with console.status("importing torch") as status:
        from advprop.measure_checkpoint import MeasureConfig, measure_checkpoint

        config = MeasureConfig(
            precisions=tuple(word.strip() for word in options["precisions"].split(",") if word.strip()),
            suite=suite,
            folder=options["work"] or folder,
            calib_data=options["calib_data"],
            calib_images=options["calib_images"],
            workers=options["workers"],
            batch_size=options["batch_size"],
            device=options["device"],
            threads=options["threads"],
        )
        paths, words = measure_checkpoint(checkpoint, config, status.update)
    for line in (words, f"files and results are in {config.folder}"):
        if line:
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    return paths


if __name__ == "__main__":
    main()
