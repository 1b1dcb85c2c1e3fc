"""`advprop eval`: how accurate and robust a model file or checkpoint is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runtime.engine.command_line import cpu_kernels_option, device_option
from runtime.errors import ConfigError
from runtime.system.console import cli_errors, counting_bars, set_up_logging

if TYPE_CHECKING:
    from rich.console import Console

    from runtime.evaluate import Cluster, Model, RunConfig, SuiteConfig
    from runtime.evaluate.results import Result

EXAMPLES = """\b
Examples:
  advprop eval model.onnx --suite imagenet --data imagenet/val
  advprop eval model.onnx model.int8.onnx --reference model.onnx --suite corruptions --data photos/val --limit 500
  advprop eval best.pt --route main --route adv --suite imagenet-a --data imagenet-a --clean imagenet/val
  advprop eval model.onnx --suite imagenet-c --data imagenet-c --only fog --only frost/3
  advprop eval model.onnx --suite corruptions --data photos/val --shard 1/4     then advprop eval-merge
  advprop eval model.onnx --suite corruptions --data photos/val --ray auto      on all machines of a Ray cluster

\b
Suites: imagenet, imagenet-v2, imagenet-a, imagenet-r, sketch, stylized, imagenet-c, cifar10, cifar10-c: the released
files, unpacked. corruptions: made on the fly from any CLASS/IMAGE folder.
A run that was stopped goes on when the same command is given again.
"""


class _Shard(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """`i/n`."""

    name = "i/n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        try:
            place, count = (int(part) for part in str(value).split("/"))
        except ValueError:
            self.fail(f"expected a shard such as 1/4; found {value!r}", param, ctx)
        return place, count


@click.command("eval", epilog=EXAMPLES)
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="MODEL...")
@click.option("--suite", required=True, metavar="NAME", help="The test set; see below.")
@click.option("--data", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Its folder.")
@click.option(
    "--clean", type=click.Path(path_type=Path), metavar="DIR", help="Clean images, CLASS/IMAGE, measured too."
)
@click.option("--reference", type=click.Path(path_type=Path), metavar="MODEL", help="Compare image by image with it.")
@click.option(
    "--route", "routes", multiple=True, metavar="NAME", help="BatchNorm route of checkpoints.  [default: main]"
)
@click.option("--only", multiple=True, metavar="CELL", help="fog, fog/3, clean, … Repeatable.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Images a cell, from all classes in proportion.")
@click.option("--seed", default=0, show_default=True, help="Of the limit and of corruptions.")
@click.option(
    "--table",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "imagenet", "tiny", "cifar"]),
    help="Severities of --suite corruptions; auto goes by the network's input size.",
)
@click.option(
    "--resize",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "fit", "none"]),
    help="auto: as the set is meant; released ImageNet-C and Stylized are not resized.",
)
@click.option("--out", default=Path("evaluation"), show_default=True, type=click.Path(path_type=Path), metavar="DIR")
@click.option("--shard", default="1/1", type=_Shard(), metavar="I/N", help="Do a part; eval-merge puts all together.")
@click.option("--cache", type=click.Path(path_type=Path), metavar="DIR", help="Keep corrupted images there.")
@click.option(
    "--batch-size", default=8, show_default=True, type=click.IntRange(min=1), help="Images at once; on a GPU, try 64."
)
@click.option("--workers", type=click.IntRange(min=0), help="Processes that decode and corrupt.  [default: cores − 1]")
@click.option(
    "--ray", "address", metavar="ADDRESS", help="Run over a Ray cluster: HOST:PORT, auto, or local to start one."
)
@click.option(
    "--ray-workers", type=click.IntRange(min=1), metavar="N", help="Its processes.  [default: what it has room for]"
)
@click.option("--ray-cpus", default=1.0, show_default=True, metavar="X", help="CPUs of each.")
@click.option("--ray-gpus", type=float, metavar="X", help="GPUs of each, such as 0.25.  [default: 1 if there are any]")
@click.option(
    "--threads", default=0, show_default=True, help="CPU threads of ONNX Runtime; 0: all cores, or --ray-cpus."
)
@device_option("Where models run.")
@cpu_kernels_option
@cli_errors
def main(
    models: tuple[Path, ...],
    suite: str,
    data: Path,
    clean: Path | None,
    reference: Path | None,
    routes: tuple[str, ...],
    only: tuple[str, ...],
    limit: int | None,
    seed: int,
    table: str,
    resize: str,
    out: Path,
    shard: tuple[int, int],
    cache: Path | None,
    batch_size: int,
    workers: int | None,
    address: str | None,
    ray_workers: int | None,
    ray_cpus: float,
    ray_gpus: float | None,
    threads: int,
    device: str,
    cpu_kernels: bool,
) -> None:
    """Measure the accuracy and robustness of MODELs: ONNX files, engines and checkpoints.

    Prints a table, and writes OUT/MODEL.SUITE.json with counts, intervals and how it was measured.
    """
    console = set_up_logging()
    from advprop.checkpoints import load_predictor
    from runtime.evaluate import RunConfig, SuiteConfig, load_model, load_models

    config = SuiteConfig(
        name=suite, data=data, clean=clean, only=only, limit=limit, seed=seed, table=table, resize=resize
    )
    default = RunConfig(out=out)
    run = RunConfig(
        out=out,
        batch_size=batch_size,
        workers=default.workers if workers is None else workers,
        shard=shard[0],
        shards=shard[1],
        cache=cache,
    )
    if address is None and (ray_workers, ray_gpus, ray_cpus) != (None, None, 1.0):
        raise ConfigError("--ray-workers, --ray-cpus and --ray-gpus go with --ray ADDRESS")
    if address is not None and workers is not None:
        raise ConfigError("--workers is of runs on this machine; over Ray, --ray-workers decode and corrupt themselves")
    with _cluster(address, ray_workers, ray_cpus, ray_gpus) as cluster:
        loader = load_model if cluster is None else cluster.load_model
        load = partial(loader, device=device, threads=threads, exact=not cpu_kernels, checkpoint_loader=load_predictor)
        loaded, compared = load_models(load, models, reference, routes or ("main",))
        results = _evaluate(console, loaded, compared, config, run, cluster)
    _write(console, results, config, run)


@contextmanager
def _cluster(address: str | None, workers: int | None, cpus: float, gpus: float | None) -> Iterator[Cluster | None]:
    if address is None:
        yield None
        return
    from runtime.evaluate import Cluster, ClusterConfig

    with Cluster(ClusterConfig(address=address, workers=workers, cpus=cpus, gpus=gpus)) as cluster:
        yield cluster


def _evaluate(
    console: Console,
    models: list[Model],
    reference: Model | None,
    config: SuiteConfig,
    run: RunConfig,
    cluster: Cluster | None,
) -> list[Result]:
    from runtime.evaluate import evaluate

    with counting_bars(console) as bars:
        task = bars.add_task(f"{config.name}, blocks of {run.batch_size}", total=None)

        def show(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        return evaluate(models, config, run, reference=reference, progress=show, cluster=cluster)


def _write(console: Console, results: list[Result], config: SuiteConfig, run: RunConfig) -> None:
    from runtime.evaluate import result_notes, result_path, result_table, write_result

    only = ["+".join(config.only).replace("/", "-")] if config.only else []
    part = [f"{run.shard}of{run.shards}"] if run.shards > 1 else []
    written = []
    for result in results:
        path = result_path(result["model"], run.out, ".".join([config.name, *only, *part, "json"]))
        write_result(path, result)
        written.append(str(path))
    console.print(result_table(results))
    for line in (*result_notes(results), f"wrote {', '.join(written)}"):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
