"""A run as plain values: `advprop.benchrun/1`, and `advprop.bench/1` for reports.

`advprop.benchrun/1` has `settings` (the BenchConfig), `images` (what `predict` was given), `machine` (before, after,
what else ran), `versions`, `models` (what took part: name, sha256, backend, device, clock, settings), `points` (a
model, batch size and number of callers each: `quantities` with percentiles, `round_medians_ms` and `ratio` to the
first model; `images_s`), `trtexec` (what it calls them), and `warnings`.
"""

from __future__ import annotations

import dataclasses
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from runtime.bench.cpu import cpu_name, cpu_state, others_share, usage
from runtime.bench.quantities import QUANTITIES
from runtime.bench.run import Bench
from runtime.bench.warnings import warnings_of
from runtime.system.cpu import usable_cores
from runtime.system.gpu import find_gpu

__all__ = ["BENCH_FORMAT", "RUN_FORMAT", "for_report", "result_of"]

BENCH_FORMAT = "advprop.bench/1"
RUN_FORMAT = "advprop.benchrun/1"

_PACKAGES = ("advprop", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "torch", "timm", "pillow")


def result_of(bench: Bench, images: str) -> dict[str, Any]:
    """Returns what a run has measured so far; `images` says what `predict` was given."""
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
        "models": [{"name": one.name, **one.facts} for one in bench.contestants],
        "points": [point.content for point in bench.points],
        "trtexec": {
            name: {key: value or None for key, value in dataclasses.asdict(quantity).items()}
            for name, quantity in QUANTITIES.items()
        },
    }
    result["warnings"] = warnings_of(result, len(states) < len(bench.gpu_states))
    return result


def for_report(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns what `advprop report` reads: file name → `advprop.bench/1`, one a model file and batch size.

    The times are end to end, of one caller. Peers have none: they are not model files of their own.
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
    """Latencies are compared where this is the same; on a CPU so must be the threads."""
    if model["device"] == "cuda":
        return machine["gpu"] or "unknown GPU"
    threads = model.get("threads") or 0
    words = f"{threads} thread{'s' * (threads > 1)}" if threads else f"all of {machine['cores']} cores"
    return f"{machine['cpu'] or 'unknown CPU'}, {words}"


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
