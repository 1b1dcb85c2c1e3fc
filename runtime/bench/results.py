"""The result of a run, `advprop.benchrun/1`, and latencies for reports, `advprop.bench/1`.

`advprop.benchrun/1` has `settings` (the BenchConfig), `images` (the input of `predict`), `machine`
(its state before and after, and other processes), `versions`, `models` (name, sha256, backend,
device, clock and settings of each target), `points` (for each model, batch size and number of
callers: `quantities` with percentiles, `round_medians_ms` and the `ratio` to the first model, and
`images_s`), `trtexec` (what each quantity means and trtexec calls it), and `warnings`.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bench.machine import cpu_name, cpu_state, others_share, usage
from runtime.bench.plot import plot_run
from runtime.bench.run import Bench, Progress
from runtime.bench.table import csv_of, markdown_of
from runtime.bench.warnings import warnings_of
from runtime.errors import AdvPropError, Interrupted
from runtime.system.cpu import usable_cores
from runtime.system.files import atomic_folder
from runtime.system.gpu import find_gpu

__all__ = [
    "BENCH_FORMAT",
    "QUANTITIES",
    "RUN_FORMAT",
    "Quantity",
    "measure_and_write",
    "report_files",
    "result_of",
    "write_run",
]

BENCH_FORMAT = "advprop.bench/1"
RUN_FORMAT = "advprop.benchrun/1"

_PACKAGES = ("advprop", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "torch", "timm", "pillow")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A time that is measured at each point."""

    meaning: str
    """Description of the measurement."""
    trtexec: str = ""
    """Name in the log of trtexec 8.5 to 11 and tensorrt_rtx; empty if they do not report it."""
    trtexec_documents: str = ""
    """Name in the documentation of TensorRT 8 to 10, if it differs."""


QUANTITIES = {
    "compute": Quantity(
        meaning="the network alone, on prepared tensors; `clock` names how it is measured",
        trtexec="GPU Compute Time",
    ),
    "h2d": Quantity(meaning="copy of input tensors to the GPU, from pinned memory; CUDA events", trtexec="H2D Latency"),
    "d2h": Quantity(meaning="copy of output tensors to the CPU; CUDA events", trtexec="D2H Latency"),
    "enqueue": Quantity(meaning="the host enqueuing copies and kernels on the stream", trtexec="Enqueue Time"),
    "latency": Quantity(meaning="h2d + compute + d2h of one call", trtexec="Latency", trtexec_documents="Host Latency"),
    "end_to_end": Quantity(
        meaning="`Session.run` from host tensors to host logits, including checks and waiting; host clock. It is not "
        "trtexec's End-to-End Host Latency, which includes waiting for the previous query"
    ),
    "predict": Quantity(meaning="`Session.predict` from encoded images to labels; host clock"),
    "decode": Quantity(meaning="part of predict: JPEG to RGB"),
    "transform": Quantity(meaning="part of predict: resize, crop and convert to the network's input"),
    "run": Quantity(meaning="part of predict: run the network and convert its outputs to labels"),
}
"""Name → quantity. In JSON, each has `p50_ms` and other statistics."""


def measure_and_write(
    bench: Bench,
    out: Path,
    images: str,
    *,
    progress: Progress | None = None,
    show: Callable[[dict[str, Any], list[Path]], None] | None = None,
) -> None:
    """Measure all points and write the result; if the run stops early, write the finished points.

    Args:
        bench: the run.
        out: an existing folder.
        images: describes the input of `predict`.
        progress: called as the run proceeds.
        show: called with the result and the written files.

    Raises:
        Interrupted: Ctrl-C was pressed, and finished points were written.
        RunFailed: a target failed.
        OutputError: the folder cannot be written, or the disk is full.
    """

    def write() -> None:
        result = result_of(bench, images)
        written = write_run(out, result)
        if show is not None:
            show(result, written)

    try:
        bench.measure(progress)
    except KeyboardInterrupt:
        if not bench.points:
            raise
        write()
        raise Interrupted(f"stopped: {len(bench.points)} points are finished and saved in {out}") from None
    except AdvPropError:
        if bench.points:
            write()
        raise
    write()


def result_of(bench: Bench, images: str) -> dict[str, Any]:
    """Return the result of a run so far; `images` describes the input of `predict`."""
    gpu = find_gpu()
    after, now = cpu_state(), usage()
    states = [state for state in bench.gpu_states if state is not None]
    result: dict[str, Any] = {
        "format": RUN_FORMAT,
        "began": bench.began,
        "settings": {**dataclasses.asdict(bench.config), "batch_sizes": list(bench.batch_sizes)},
        "images": images,
        "machine": {
            "cpu": cpu_name(),
            "cores": usable_cores(),
            "gpu": gpu.name if gpu else None,
            "system": f"{platform.system()} {platform.machine()}",
            "before": bench.before,
            "after": after,
            "others_share": others_share(bench.usage_before, now),
            "gpu_states": states,
        },
        "versions": _versions(),
        "models": [{"name": target.name, **target.facts} for target in bench.targets],
        "points": [point.content for point in bench.points],
        "trtexec": {
            name: {key: value or None for key, value in dataclasses.asdict(quantity).items()}
            for name, quantity in QUANTITIES.items()
        },
    }
    result["warnings"] = warnings_of(result, gpu_unknown=len(states) < len(bench.gpu_states))
    return result


def write_run(out: Path, result: dict[str, Any]) -> list[Path]:
    """Write the result as JSON, Markdown, CSV and a plot, and MODEL.batchN.json for reports.

    All files appear together when they are complete. Files of other runs are kept.

    Args:
        out: an existing folder.
        result: `advprop.benchrun/1` with at least one point.

    Returns:
        Paths of the files.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    texts = {"bench.json": _json(result), "bench.md": markdown_of(result), "bench.csv": csv_of(result)}
    texts |= {name: _json(content) for name, content in report_files(result).items()}
    with atomic_folder(out) as folder:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        for name in ("latency_throughput.png", "latency_throughput.svg"):
            plot_run(folder / name, result)
        written = sorted(path.name for path in folder.iterdir())
    return [out / name for name in written]


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def report_files(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the files for `advprop report`: name → `advprop.bench/1`, per model and batch size.

    The times are end to end, with a single caller. Peers are omitted, because they are not model
    files.
    """
    models = {model["name"]: model for model in result["models"]}
    files = {}
    for point in result["points"]:
        model = models[point["model"]]
        if point["concurrency"] != 1 or "peer" in model:
            continue
        times = point["quantities"]["end_to_end"]
        files[f"{model['name']}.batch{point['batch_size']}.json"] = {
            "format": BENCH_FORMAT,
            "model": {"name": model["name"], "sha256": model["sha256"]},
            "device": _device(model, result["machine"]),
            "backend": _backend(model, result["versions"]),
            "batch_size": point["batch_size"],
            **{key: times[key] for key in ("p50_ms", "p90_ms", "p95_ms", "p99_ms", "cov_percent", "count")},
            "quantity": "end_to_end",
            "images_s": point["images_s"],
        }
    return files


def _device(model: dict[str, Any], machine: dict[str, Any]) -> str:
    """Return the device, and on a CPU the threads. Latencies are comparable only if it is equal."""
    if model["device"] == "cuda":
        return machine["gpu"] or "unknown GPU"
    threads = model.get("threads") or 0
    used = f"{threads} thread{'s' * (threads > 1)}" if threads else f"all of {machine['cores']} cores"
    return f"{machine['cpu'] or 'unknown CPU'}, {used}"


def _backend(model: dict[str, Any], versions: dict[str, str]) -> str:
    if model["kind"] == "engine":
        return f"{model['flavor']} {model['version']}"
    if model["backend"] == "onnxruntime":
        return f"onnxruntime {versions.get('onnxruntime-gpu') or versions.get('onnxruntime', '')}".rstrip()
    return str(model["backend"])


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "numpy": np.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
