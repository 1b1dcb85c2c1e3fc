"""`advprop bench`: measure the latency and throughput of models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runtime.system.command import (
    CommaList,
    Command,
    Option,
    as_config,
    data_option,
    device_option,
    json_option,
    out_option,
    seed_option,
    threads_option,
    with_options,
)
from runtime.system.console import print_json, print_lines, progress_bars, set_up_logging, status

if TYPE_CHECKING:
    from rich.console import Console

    from runtime.bench import Bench, BenchConfig, LoadOptions

EXAMPLES = """
Examples:
  advprop bench model.fp16.engine --against torch,ort
  advprop bench model.onnx model.int8.onnx --batch-sizes 1,8 --threads 4
  advprop bench model.fp16.engine --batch-sizes 8 --concurrency 1,2,4,8
  advprop bench model.onnx best.pt --data photos/ --duration-s 10
  advprop report evaluation/*.json bench/*.batch1.json -o report.html

Models take turns in short rounds. Each ratio compares a FILE with the first FILE in the same round.
Ctrl-C keeps the measurements that are finished.
"""

_NUMBERS = CommaList(int, "whole numbers such as 1,8,32")


def _number_option(name: str, default: float, help_text: str) -> Option:
    return Option([name], default=default, show_default=True, group="Measurement", help=help_text)


def _bench_config(values: dict[str, Any]) -> BenchConfig:
    from runtime.bench import BenchConfig

    return BenchConfig(batch_sizes=values.pop("batch_sizes") or (), **values)


_MEASUREMENT = (
    Option(
        ["--batch-sizes"],
        former=["--batch"],
        type=_NUMBERS,
        metavar="N,...",
        group="Measurement",
        help="Batch sizes to measure (default: those of 1,8,32 that every FILE accepts).",
    ),
    Option(
        ["--concurrency"],
        default="1",
        show_default=True,
        type=_NUMBERS,
        metavar="N,...",
        group="Measurement",
        help="Numbers of threads that call the model at once.",
    ),
    _number_option("--warm-up-ms", 200.0, "Warm-up before each measurement, in milliseconds."),
    _number_option("--duration-s", 3.0, "Seconds per metric, file and batch size."),
    _number_option("--iterations", 10, "Minimum number of calls per measurement."),
    _number_option("--rounds", 10, "Interleaved rounds per file."),
    seed_option("the order of turns and for generated images", group="Measurement"),
)


def _load_options(values: dict[str, Any]) -> LoadOptions:
    from runtime.bench import LoadOptions

    return LoadOptions(cuda_graphs=values.pop("graphs"), **values)


_EXECUTION = (
    threads_option("CPU threads per run; 0 leaves the choice to each library.", group="Execution"),
    Option(
        ["--spin/--no-spin"],
        default=None,
        group="Execution",
        help="Let ONNX Runtime's idle threads spin (default: spin).",
    ),
    Option(
        ["--graphs/--no-graphs"],
        default=None,
        group="Execution",
        help="Let engines replay CUDA graphs (default: graphs).",
    ),
    Option(
        ["--contexts"],
        type=click.IntRange(min=1),
        group="Execution",
        help="Execution contexts per engine, that is, batches in flight (default: one per calling thread).",
    ),
    device_option(group="Execution"),
)


@click.command("bench", cls=Command, epilog=EXAMPLES)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@with_options(
    Option(
        ["--against"],
        default="",
        type=CommaList(str),
        metavar="PEERS",
        help="Peers to measure as well: torch, ort or torch,ort.",
    ),
    data_option(former=["--images"], help="Folder of images for the metric predict (default: generated images)."),
    out_option("Folder for results.", default=Path("bench")),
    json_option(),
)
@as_config("config", _MEASUREMENT, _bench_config)
@as_config("load", _EXECUTION, _load_options)
def main(
    files: tuple[Path, ...],
    against: tuple[str, ...],
    data: Path | None,
    out: Path,
    as_json: bool,
    config: BenchConfig,
    load: LoadOptions,
) -> None:
    """Measure latency and throughput of FILEs: ONNX files, engines and checkpoints.

    Prints a table and writes it to OUT, with a plot, all numbers as JSON and CSV, and files for
    advprop report.
    """
    console = set_up_logging()
    from advprop.checkpoints import open_torch_peer
    from runtime.bench import SYNTHETIC, Bench, open_targets
    from runtime.system.files import output_dir

    with status("loading"):
        targets = open_targets(files, against, load, max_callers=max(config.concurrency), torch_opener=open_torch_peer)
    try:
        output_dir(out)  # after loading: a file that cannot be loaded leaves no folder behind
        bench = Bench(targets, config, data)
        _measure(console, bench, out, str(data) if data else SYNTHETIC, as_json)
    finally:
        for target in targets:
            target.close()


def _measure(console: Console, bench: Bench, out: Path, images: str, as_json: bool) -> None:
    from runtime.bench import measure_and_write, notes_of, table_of

    def show(result: dict[str, Any], written: list[Path]) -> None:
        if as_json:
            print_json(result)
            return
        console.print(table_of(result))
        files = ", ".join(path.name for path in written)
        print_lines(console, (*notes_of(result), f"wrote {files} to {out}"))

    # Drawn between rounds only: a drawing thread would compete with the model that is being
    # measured.
    with progress_bars(auto_refresh=False) as bars:
        task = bars.add_task("", total=None)

        def progress(done: int, total: int, description: str) -> None:
            bars.update(task, completed=done, total=total, description=f"rounds, {description}", refresh=True)

        measure_and_write(bench, out, images, progress=progress, show=show)


if __name__ == "__main__":
    main()
