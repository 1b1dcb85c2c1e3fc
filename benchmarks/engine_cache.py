"""Time of a first build and of the second, which the engine cache answers.

    python benchmarks/engine_cache.py              five families in FP32 and FP16: about three minutes on two cores

Random weights, each net at its own size, engines of TensorRT-RTX for SM 89. `first`: built and kept. `second`: to
another place, from the cache: the ONNX file hashed and read, the plan read, hashed, written and synced. `again`: to the
same place, where the engine is already. Medians of five, in seconds of the clock, beside the processor's own for
`second`: on a busy machine the clock says more about the others. `command`: a whole `advprop build` of it, the
libraries' loading included. Imports are done before the first three.
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
from pathlib import Path

import onnx
import timm
import torch

import runtime
from calib.precision import to_reduced
from export.source import timm_spec
from export.to_onnx import to_onnx

NETS = ("resnet18", "efficientnet_b0", "mobilenetv3_small_050", "densenet121", "convnext_atto")
ROUNDS = 5


def write_onnx(arch: str, folder: Path) -> dict[str, Path]:
    """FP32 and FP16 files of a net with random weights."""
    torch.manual_seed(0)
    model = timm.create_model(arch).eval()
    graph = to_onnx(model, timm_spec(model, arch))
    onnx.save(graph, folder / f"{arch}.onnx")
    onnx.save(to_reduced(graph, "fp16"), folder / f"{arch}.fp16.onnx")
    return {"fp32": folder / f"{arch}.onnx", "fp16": folder / f"{arch}.fp16.onnx"}


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def measure(arch: str, precision: str, source: Path, folder: Path) -> None:
    def build(name: str) -> object:
        return runtime.build(source, folder / name, sm=(89,), flavour="tensorrt_rtx", cache=True)

    first, _ = timed(lambda: build("first.engine"))
    second = [timed(lambda number=number: build(f"{number}.engine")) for number in range(ROUNDS)]
    again = [timed(lambda: build("first.engine"))[0] for _ in range(ROUNDS)]
    command = [sys.executable, "-m", "runtime.cli", "build", str(source), "--sm", "89", "--builder", "tensorrt_rtx"]
    whole, _ = timed(
        lambda: subprocess.run([*command, "--out", str(folder / "c.engine")], check=True, capture_output=True)
    )
    print(
        f"| {arch} | {precision} | {(folder / 'first.engine').stat().st_size / 1e6:.1f} | {first:.2f} "
        f"| {statistics.median(clock for clock, _ in second):.2f} "
        f"| {statistics.median(processor for _, processor in second):.2f} | {statistics.median(again):.2f} "
        f"| {whole:.1f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=list(NETS))
    arguments = parser.parse_args()
    print("| net | | MB | first s | second s | of the processor s | again s | command s |\n" + "|---" * 8 + "|")
    with tempfile.TemporaryDirectory() as name:
        os.environ["ADVPROP_CACHE"] = str(Path(name) / "cache")
        runtime.build(write_onnx("resnet10t", Path(name))["fp16"], sm=(89,), flavour="tensorrt_rtx")  # imports
        for arch in arguments.arch:
            for precision, source in write_onnx(arch, Path(name)).items():
                measure(arch, precision, source, Path(name))


if __name__ == "__main__":
    main()
