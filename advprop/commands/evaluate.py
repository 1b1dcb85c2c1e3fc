"""`advprop eval`: measure the accuracy and robustness of models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runtime.errors import ConfigError
from runtime.system.command import (
    Command,
    Option,
    as_config,
    batch_size_option,
    data_option,
    device_option,
    json_option,
    kernels_option,
    limit_option,
    out_option,
    seed_option,
    threads_option,
    with_options,
    workers_option,
)
from runtime.system.console import print_json, print_lines, progress_bars, set_up_logging

if TYPE_CHECKING:
    from rich.console import Console

    from runtime.evaluate import Cluster, ClusterConfig, Model, RunConfig, SuiteConfig
    from runtime.evaluate.results import Result

EXAMPLES = """
Examples:
  advprop eval model.onnx --suite imagenet --data imagenet/val
  advprop eval model.onnx model.int8.onnx --reference model.onnx --suite corruptions --data photos/val --limit 500
  advprop eval best.pt --route main --route adv --suite imagenet-a --data imagenet-a --clean imagenet/val
  advprop eval model.onnx --suite imagenet-c --data imagenet-c --only fog --only frost/3
  advprop eval model.onnx --suite corruptions --data photos/val --adapt 32 --adapt 128
  advprop eval model.onnx --suite corruptions --data photos/val --shard 1/4     merge with advprop eval-merge
  advprop eval model.onnx --suite corruptions --data photos/val --ray auto      on all machines of a Ray cluster

Suites: imagenet, imagenet-v2, imagenet-a, imagenet-r, sketch, stylized, imagenet-c, cifar10 and cifar10-c
read the unpacked releases. corruptions corrupts the images of any CLASS/IMAGE folder on the fly.
To resume an interrupted run, repeat its command.
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


def suite_config(values: dict[str, Any]) -> SuiteConfig:
    """Return the SuiteConfig that the options of `_SUITE` describe."""
    from runtime.evaluate import SuiteConfig

    return SuiteConfig(**values)


_SUITE = (
    Option(["--suite", "name"], required=True, metavar="NAME", help="Test set to measure; see Suites below."),
    data_option(required=True, help="Folder of the test set."),
    Option(
        ["--clean"],
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Folder of clean images, CLASS/IMAGE, to measure as well.",
    ),
    Option(
        ["--only"],
        multiple=True,
        metavar="CELL",
        help="Cell to measure: fog, fog/3, clean (default: all). Repeatable.",
    ),
    limit_option("images per cell"),
    Option(
        ["--adapt"],
        multiple=True,
        type=click.IntRange(min=1),
        metavar="N",
        help="Number of images of each cell to adapt the models to, as advprop adapt does. These images are not "
        "tested. The metrics are mce_adapted_N and mean_error_adapted_N, next to those without adaptation. Repeatable.",
    ),
    seed_option("sampling and corruptions"),
    Option(
        ["--table"],
        default="auto",
        show_default=True,
        type=click.Choice(["auto", "imagenet", "tiny", "cifar"]),
        help="Severity table of the suite corruptions; auto chooses by the network's input size.",
    ),
    Option(
        ["--resize"],
        default="auto",
        show_default=True,
        type=click.Choice(["auto", "fit", "none"]),
        help="Resizing of images; auto never resizes the released ImageNet-C and Stylized-ImageNet.",
    ),
)


def _cluster_config(values: dict[str, Any]) -> ClusterConfig | None:
    address, workers = values["ray"], values["ray_workers"]
    cpus, gpus = values["ray_cpus"], values["ray_gpus"]
    if address is None:
        if (workers, gpus, cpus) != (None, None, 1.0):
            raise ConfigError("--ray-workers, --ray-cpus and --ray-gpus require --ray ADDRESS")
        return None
    from runtime.evaluate import ClusterConfig

    return ClusterConfig(address=address, workers=workers, cpus=cpus, gpus=gpus)


_RAY = (
    Option(
        ["--ray"],
        metavar="ADDRESS",
        group="Ray cluster",
        help="Address of a Ray cluster, HOST:PORT; auto finds one, local starts one.",
    ),
    Option(
        ["--ray-workers"],
        type=click.IntRange(min=1),
        metavar="N",
        group="Ray cluster",
        help="Number of Ray workers (default: as many as fit).",
    ),
    Option(["--ray-cpus"], default=1.0, show_default=True, metavar="X", group="Ray cluster", help="CPUs per worker."),
    Option(
        ["--ray-gpus"],
        type=float,
        metavar="X",
        group="Ray cluster",
        help="GPUs per worker, such as 0.25 (default: 1 if the cluster has GPUs).",
    ),
)


_EXECUTION = (
    Option(
        ["--shard"], group="Execution", default="1/1", type=_Shard(), metavar="I/N", help="Shard to measure, I of N."
    ),
    Option(
        ["--cache"],
        group="Execution",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Folder to keep corrupted images in, for later runs.",
    ),
    batch_size_option(8, " On a GPU, try 64.", group="Execution"),
    workers_option(group="Execution"),
    threads_option("CPU threads of ONNX Runtime; 0 uses all cores, or --ray-cpus.", group="Execution"),
    device_option(group="Execution"),
    kernels_option("measure", group="Execution"),
)


@click.command("eval", cls=Command, epilog=EXAMPLES)
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="MODEL...")
@as_config("suite", _SUITE, suite_config)
@with_options(
    Option(
        ["--reference"],
        type=click.Path(path_type=Path),
        metavar="MODEL",
        help="Model to compare with, image by image.",
    ),
    Option(
        ["--route", "routes"], multiple=True, metavar="NAME", help="BatchNorm route of checkpoints (default: main)."
    ),
    out_option("Folder for results.", default=Path("evaluation")),
    json_option("the results as JSON instead of a table"),
    *_EXECUTION,
)
@as_config("cluster", _RAY, _cluster_config)
def main(
    models: tuple[Path, ...],
    suite: SuiteConfig,
    reference: Path | None,
    routes: tuple[str, ...],
    as_json: bool,
    cluster: ClusterConfig | None,
    **execution: Any,
) -> None:
    """Measure the accuracy and robustness of MODELs: ONNX files, engines and checkpoints.

    Prints a table and writes OUT/MODEL.SUITE.json with counts, confidence intervals and provenance.
    """
    console = set_up_logging()
    from advprop.checkpoints import load_predictor
    from runtime.evaluate import load_model, load_models
    from runtime.evaluate.models import with_adapted

    if cluster is not None and suite.adapt:
        raise ConfigError("--adapt cannot be combined with --ray; divide the work with --shard")
    if cluster is not None and execution["workers"] is not None:
        raise ConfigError("--workers cannot be combined with --ray; use --ray-workers")
    run = _run_config(execution)
    with _open_cluster(cluster) as connected:
        loader = load_model if connected is None else connected.load_model
        load = partial(
            loader,
            device=execution["device"],
            threads=execution["threads"],
            exact=execution["gpu_kernels"],
            checkpoint_loader=load_predictor,
        )
        loaded, compared = load_models(load, models, reference, routes or ("main",))
        loaded = with_adapted(loaded, suite.adapt)
        results = _evaluate(loaded, compared, suite, run, connected)
    show_results(console, results, _write(results, suite, run), as_json)


def _run_config(execution: dict[str, Any]) -> RunConfig:
    from runtime.evaluate import RunConfig

    workers = {} if execution["workers"] is None else {"workers": execution["workers"]}
    shard, shards = execution["shard"]
    return RunConfig(
        out=execution["out"],
        batch_size=execution["batch_size"],
        shard=shard,
        shards=shards,
        cache=execution["cache"],
        **workers,
    )


@contextmanager
def _open_cluster(config: ClusterConfig | None) -> Iterator[Cluster | None]:
    if config is None:
        yield None
        return
    from runtime.evaluate import Cluster

    with Cluster(config) as cluster:
        yield cluster


def _evaluate(
    models: list[Model],
    reference: Model | None,
    suite: SuiteConfig,
    run: RunConfig,
    cluster: Cluster | None,
) -> list[Result]:
    from runtime.evaluate import evaluate

    with progress_bars() as bars:
        task = bars.add_task(f"{suite.name}, batches of {run.batch_size}", total=None)

        def show(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        return evaluate(models, suite, run, reference=reference, progress=show, cluster=cluster)


def _write(results: Sequence[Result], suite: SuiteConfig, run: RunConfig) -> list[Path]:
    from runtime.evaluate import result_path, write_result

    only = ["+".join(suite.only).replace("/", "-")] if suite.only else []
    part = [f"{run.shard}of{run.shards}"] if run.shards > 1 else []
    written = []
    for result in results:
        path = result_path(result["model"], run.out, ".".join([suite.name, *only, *part, "json"]))
        write_result(path, result)
        written.append(path)
    return written


def show_results(console: Console, results: list[Result], written: Sequence[Path], as_json: bool) -> None:
    """Print results of evaluations as a table with notes, or as a JSON array."""
    from runtime.evaluate import result_notes, result_table

    if as_json:
        print_json(results)
        return
    console.print(result_table(results))
    print_lines(console, (*result_notes(results), f"wrote {', '.join(map(str, written))}"))


if __name__ == "__main__":
    main()
