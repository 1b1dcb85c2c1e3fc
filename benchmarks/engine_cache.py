"""Time of a first build and of the second, which the engine cache answers.

    python -m benchmarks.engine_cache --data imagenet_dev    twelve families in FP32, FP16 and INT8: about seven minutes

Random weights, each net at its own size, engines of TensorRT-RTX for SM 89 and batches of 1 to 32. INT8 thresholds are
the largest values on 32 images of `--data`. `first`: built and kept. `second`: to another place, from the cache: the
ONNX file read and hashed, the cached plan hashed and linked to. Medians of five, in seconds of the clock, beside the
processor's own for `second`: on a busy machine the clock says more about the others. `command`: a whole `advprop build`
of it, most of it the loading of libraries. Imports are done before the first two. `computes in` is what
`advprop inspect`, run on the engine of the second build, has read: of INT8 the share of MACs and of layers.
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
    """FP32, FP16 and, where there are images, INT8 files of a net with random weights."""
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
    """Seconds of the clock and of the processor."""
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
    parser.add_argument("--data", type=Path, help="Images to calibrate with, CLASS/IMAGE; without, no INT8.")
    arguments = parser.parse_args()
    print("| net | | MB | first s | second s | of the processor s | command s | computes in |\n" + "|---" * 8 + "|")
    with tempfile.TemporaryDirectory() as name:
        os.environ["ADVPROP_CACHE"] = str(Path(name) / "cache")
        runtime.build(write_onnx("resnet10t", None, Path(name))["fp16"], sm=(89,), flavor="tensorrt_rtx")  # imports
        for arch in arguments.arch:
            for precision, source in write_onnx(arch, arguments.data, Path(name)).items():
                measure(arch, precision, source, Path(name))


if __name__ == "__main__":
    main()
