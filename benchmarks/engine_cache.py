"""Compare the time of an engine build with the time of fetching the same engine from the cache.

    python -m benchmarks.engine_cache --data imagenet_dev    twelve networks, about seven minutes

Each network has random weights and its own image size. Engines are TensorRT-RTX engines for SM 89
and batches of 1 to 32, in FP32, FP16 and INT8. INT8 thresholds are the largest magnitudes on 32
images of `--data`.

    first           a build, added to the cache; libraries are already imported
    second          the same build from the cache: hash both files and link the plan; median of 5
    second, CPU     CPU time of `second`, which is more reliable on a busy machine
    command         the command `advprop build` with the cache; it mostly imports libraries
    computes in     precision of the engine; for INT8, the INT8 layers and their share of the MACs
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx
import timm
import torch

import runtime
from benchmarks.families import NETS
from calib import collect_amax
from calib.images import calibration_set
from calib.placement import points_of
from calib.precision import to_reduced
from calib.quantize import quantize
from export.source import timm_spec
from export.to_onnx import to_onnx
from runtime.engine.int8 import summary_of
from runtime.engine.sidecar import EngineInfo, read_sidecar

IMAGES = 32
ROUNDS = 5


def write_onnx(arch: str, data: Path | None, folder: Path) -> dict[str, Path]:
    """Write FP32, FP16 and, if `data` is set, INT8 files of a network with random weights."""
    torch.manual_seed(0)
    model = timm.create_model(arch).eval()
    spec = timm_spec(model, arch)
    graph = to_onnx(model, spec)
    graphs = {"fp32": graph, "fp16": to_reduced(graph, "fp16")}
    if data is not None:
        images = calibration_set(data, IMAGES, spec.preprocessing)
        thresholds = collect_amax(graph, images.batches(spec.preprocessing, IMAGES))
        graphs["int8"] = to_reduced(quantize(graph, points_of(graph), thresholds), "fp16")
    files = {precision: folder / f"{arch}.{precision}.onnx" for precision in graphs}
    for precision, file in files.items():
        onnx.save(graphs[precision], file)
    return files


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return the wall-clock time and the CPU time of `work`, in seconds."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def measure(arch: str, precision: str, source: Path, folder: Path) -> None:
    def build(name: str) -> EngineInfo:
        return runtime.build(source, folder / name, sm=(89,), flavor="tensorrt_rtx", cache=True)

    first, _ = timed(partial(build, "first.engine"))
    second = [timed(partial(build, f"{number}.engine")) for number in range(ROUNDS)]
    info = read_sidecar(folder / "0.engine")
    inspect = [sys.executable, "-m", "advprop.cli", "inspect", str(folder / "0.engine")]
    subprocess.run(inspect, check=True, capture_output=True)
    command = [sys.executable, "-m", "advprop.cli", "build", str(source), "--sm", "89", "--builder", "tensorrt_rtx"]
    whole, _ = timed(
        lambda: subprocess.run([*command, "--out", str(folder / "c.engine")], check=True, capture_output=True)
    )
    print(
        f"| {arch} | {precision} | {(folder / 'first.engine').stat().st_size / 1e6:.1f} | {first:.2f} "
        f"| {statistics.median(clock for clock, _ in second):.2f} "
        f"| {statistics.median(processor for _, processor in second):.2f} | {whole:.1f} "
        f"| {summary_of(info.layers) if info.layers else info.precision} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=list(NETS))
    parser.add_argument("--data", type=Path, help="Calibration images, CLASS/IMAGE (default: no INT8 files).")
    arguments = parser.parse_args()
    print("| network | | MB | first, s | second, s | second, CPU s | command, s | computes in |\n" + "|---" * 8 + "|")
    with tempfile.TemporaryDirectory() as name:
        os.environ["ADVPROP_CACHE"] = str(Path(name) / "cache")
        runtime.build(write_onnx("resnet10t", None, Path(name))["fp16"], sm=(89,), flavor="tensorrt_rtx")  # imports
        for arch in arguments.arch:
            for precision, source in write_onnx(arch, arguments.data, Path(name)).items():
                measure(arch, precision, source, Path(name))


if __name__ == "__main__":
    main()
