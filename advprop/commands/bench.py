"""`advprop bench`: how fast model files are, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runtime.engine.command_line import device_option
from runtime.system.console import cli_errors, counting_bars, set_up_logging

if TYPE_CHECKING:
    from rich.console import Console

    from runtime.bench import Bench

EXAMPLES = """\b
Examples:
  advprop bench model.fp16.engine --against torch,ort
  advprop bench model.onnx model.int8.onnx --batch 1,8 --threads 4
  advprop bench model.fp16.engine --batch 8 --concurrency 1,2,4,8
  advprop bench model.onnx best.pt --images photos/ --duration-s 10
  advprop report evaluation/*.json bench/*.batch1.json -o report.html

\b
All take turns in short rounds; ratios are of the same round, to the first FILE.
Ctrl-C keeps the points that are finished.
"""


class _Numbers(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """`1,8,32`."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(word) for word in str(value).split(","))
        except ValueError:
            self.fail(f"expected numbers such as 1,8,32; found {value!r}", param, ctx)


@click.command("bench", epilog=EXAMPLES)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option("--against", default="", metavar="PEERS", help="torch, ort or torch,ort: compare with them too.")
@click.option(
    "--batch", type=_Numbers(), metavar="N,...", help="Batch sizes.  [default: those of 1,8,32 that all take]"
)
@click.option(
    "--concurrency", default="1", show_default=True, type=_Numbers(), metavar="N,...", help="Calling threads."
)
@click.option("--images", type=click.Path(path_type=Path), metavar="DIR", help="Images of predict.  [default: made]")
@click.option("--out", default=Path("bench"), show_default=True, type=click.Path(path_type=Path), metavar="DIR")
@click.option("--warm-up-ms", default=200.0, show_default=True, help="Before each point, of each FILE.")
@click.option("--duration-s", default=3.0, show_default=True, help="Of each quantity, FILE and point.")
@click.option("--iterations", default=10, show_default=True, help="Calls at the least, likewise.")
@click.option("--rounds", default=10, show_default=True, help="Turns that each FILE gets.")
@click.option("--seed", default=0, show_default=True, help="Of the order of turns, and of images.")
@device_option("Where all run.")
@click.option("--threads", default=0, show_default=True, help="CPU threads of one run; 0: as each library likes.")
@click.option("--spin/--no-spin", default=None, help="ONNX Runtime's idle threads spin.  [default: spin]")
@click.option("--graphs/--no-graphs", default=None, help="Engines replay CUDA graphs.  [default: graphs]")
@click.option("--contexts", type=click.IntRange(min=1), help="Batches at once in an engine.  [default: callers]")
@cli_errors
def main(files: tuple[Path, ...], against: str, out: Path, images: Path | None, **options: Any) -> None:
    """Measure latency and throughput of FILEs: ONNX files, engines and checkpoints.

    Prints a table, and writes it to OUT with a plot, all numbers as JSON and CSV, and files for advprop report.
    """
    console = set_up_logging()
    from advprop.checkpoints import open_torch_peer
    from runtime.bench import SYNTHETIC, Bench, BenchConfig, LoadOptions, open_targets
    from runtime.system.files import output_dir

    config = BenchConfig(
        batch_sizes=options["batch"] or (),
        **{name: options[name] for name in ("concurrency", "warm_up_ms", "duration_s", "iterations", "rounds", "seed")},
    )
    load = LoadOptions(
        cuda_graphs=options["graphs"], **{name: options[name] for name in ("device", "threads", "spin", "contexts")}
    )
    output_dir(out)
    peers = [word.strip() for word in against.split(",") if word.strip()]
    with console.status("loading"):
        targets = open_targets(files, peers, load, max_callers=max(config.concurrency), torch_opener=open_torch_peer)
    try:
        with console.status("making images"):
            bench = Bench(targets, config, images)
        _measure(console, bench, out, str(images) if images else SYNTHETIC)
    finally:
        for target in targets:
            target.close()


def _measure(console: Console, bench: Bench, out: Path, images: str) -> None:
    from runtime.bench import measure_and_write, notes_of, table_of

    def show(result: dict[str, Any], written: list[Path]) -> None:
        console.print(table_of(result))
        for line in (*notes_of(result), f"wrote {', '.join(path.name for path in written)} to {out}"):
            console.print(line, highlight=False, soft_wrap=True, markup=False)

    # Bars are drawn between rounds only: a thread that draws would compete with what is measured.
    with counting_bars(console, auto_refresh=False) as bars:
        task = bars.add_task("", total=None)

        def progress(done: int, total: int, description: str) -> None:
            bars.update(task, completed=done, total=total, description=f"rounds, {description}", refresh=True)

        measure_and_write(bench, out, images, progress=progress, show=show)


if __name__ == "__main__":
    main()
