"""Run one network on a GPU with every backend, and compare results and latencies.

    python -m benchmarks.gpu.runtime    efficientnet_b0 with random weights, about ten minutes
    python -m benchmarks.gpu.runtime --arch resnet50 --batches 1 32 --seconds 1 --json result.json

docs/results/gpu.md holds what was run: numerics and zero-copy of ONNX Runtime, no engines. The script
has six parts. A part that cannot run reports the reason.
`engines` always runs; `--parts` selects the others.

- engines: build, load and run FP32 and FP16 engines with each installed TensorRT.
- numerics: largest difference of the logits, relative to the largest logit, and agreement of the
  classes. The reference is FP32 on the CPU.
- latency: from host memory to host memory, next to torch, eager and compiled, in interleaved
  rounds.
- graphs: engines with and without CUDA graphs.
- zero-copy: input on the GPU from torch (DLPack), `__cuda_array_interface__` and pycuda; outputs
  stay on the GPU.
- threads: eight threads on one session, engines with 1, 2, 4 and 8 contexts; each result is
  compared with that of one thread.

With random weights all logits are nearly equal, so the agreement of the classes is not meaningful.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import runtime
from runtime.errors import AdvPropError
from runtime.system.gpu import find_gpu

PARTS = ("numerics", "latency", "graphs", "zero-copy", "threads")
FLAVORS = ("tensorrt", "tensorrt_rtx")
THREADS = 8
Calls = dict[str, Callable[[], Any]]


class Rows:
    """Prints and stores measurements."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, part: str, name: str, **found: Any) -> None:
        self.rows.append({"part": part, "name": name, **found})
        words = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items())
        print(f"{part:10} {name:34} {'  '.join(words)}", flush=True)


def times_ms(calls: Calls, seconds: float) -> dict[str, list[float]]:
    """Return the milliseconds of each call. The calls take turns, for `seconds` each on average.

    A call must return when its work is done.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(5):
            call()
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end:
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            found[name].append(1e3 * (time.perf_counter() - began))
    return found


def report_times(rows: Rows, part: str, batch: int, calls: Calls, seconds: float) -> None:
    for name, times in times_ms(calls, seconds).items():
        p50, p90, p99 = (float(np.percentile(times, q)) for q in (50, 90, 99))
        cov = statistics.pstdev(times) / statistics.fmean(times)
        rows.add(part, f"{name}, batch {batch}", p50_ms=p50, p90_ms=p90, p99_ms=p99, cov=cov, n=len(times))


def files_of(arch: str, folder: Path) -> dict[str, Path]:
    from benchmarks.export_time import write_checkpoint
    from export.config import ExportConfig
    from export.pipeline import export_checkpoint

    write_checkpoint(arch, folder / "checkpoint.pt")
    result = export_checkpoint(folder / "checkpoint.pt", ExportConfig(out=folder, precision="fp16"))
    assert result.reduced_onnx is not None
    return {"fp32": result.onnx, "fp16": result.reduced_onnx}


def engines_of(files: dict[str, Path], most: int, rows: Rows) -> dict[str, Path]:
    """Build all engines that can be built, and return those that run on this GPU."""
    engines = {}
    for flavor in FLAVORS:
        for precision, file in files.items():
            name, path = f"{flavor} {precision}", file.with_name(f"{flavor}.{precision}.engine")
            try:
                began = time.perf_counter()
                runtime.build(file, path, batch=(1, most // 2 or 1, most), flavor=flavor)
                built_s = time.perf_counter() - began
                began = time.perf_counter()
                runtime.load(path).close()
            except AdvPropError as error:
                rows.add("engines", name, runs=f"no, {error}")
            else:
                engines[name] = path
                rows.add("engines", name, runs="yes", build_s=built_s, load_s=time.perf_counter() - began)
    return engines


def sessions_of(
    files: dict[str, Path], engines: dict[str, Path], rows: Rows, part: str, stack: ExitStack
) -> dict[str, runtime.Session]:
    sessions = {}
    ways = {f"cuda provider {key}": (file, "onnxruntime") for key, file in files.items()}
    ways |= {f"tensorrt provider {key}": (file, "onnxruntime-tensorrt") for key, file in files.items()}
    ways |= {name: (file, "tensorrt") for name, file in engines.items()}
    for name, (path, backend) in ways.items():
        try:
            sessions[name] = stack.enter_context(runtime.load(path, backend=backend, device="cuda"))
        except AdvPropError as error:
            rows.add(part, name, error=str(error))
    return sessions


def numerics(rows: Rows, files: dict[str, Path], sessions: dict[str, runtime.Session], images: np.ndarray) -> None:
    with runtime.load(files["fp32"], device="cpu") as session:
        expected = session.run(images)
    for name, session in sessions.items():
        found = session.run(images)
        rows.add(
            "numerics",
            name,
            max_relative=float(np.abs(found - expected).max() / np.abs(expected).max()),
            agreement=float((found.argmax(1) == expected.argmax(1)).mean()),
        )


def torch_calls(arch: str, batch: np.ndarray, compiled: bool) -> Calls:
    """Return calls of the network in torch, from and to host memory through pinned memory."""
    import timm
    import torch

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = timm.create_model(arch).eval().cuda()
    pinned = torch.from_numpy(batch).pin_memory()

    @torch.inference_mode()
    def run(network: Any, dtype: Any) -> Any:
        return network(pinned.to("cuda", non_blocking=True).to(dtype)).float().cpu()

    half = timm.create_model(arch).eval().cuda().half()
    calls: Calls = {}
    for name, network, dtype in (("fp32", model, torch.float32), ("fp16", half, torch.float16)):
        calls[f"torch eager {name}"] = partial(run, network, dtype)
        if compiled:
            calls[f"torch compiled {name}"] = partial(run, torch.compile(network, mode="reduce-overhead"), dtype)
    return calls


def latency(rows: Rows, arch: str, sessions: dict[str, runtime.Session], images: np.ndarray, options: Any) -> None:
    for size in options.batches:
        batch = images[:size]
        calls = torch_calls(arch, batch, not options.eager)
        calls |= {name: partial(session.run, batch) for name, session in sessions.items()}
        report_times(rows, "latency", size, calls, options.seconds)


def graphs(rows: Rows, engines: dict[str, Path], images: np.ndarray, options: Any) -> None:
    for name, path in engines.items():
        with (
            runtime.load(path) as on,
            runtime.load(path, engine=runtime.EngineOptions(cuda_graphs=False)) as off,
        ):
            same = all(np.array_equal(on.run(images[:8]), off.run(images[:8])) for _ in range(4))
            rows.add("graphs", name, same_bits=same)
            for size in options.batches:
                calls: Calls = {
                    f"{name} on": partial(on.run, images[:size]),
                    f"{name} off": partial(off.run, images[:size]),
                }
                report_times(rows, "graphs", size, calls, options.seconds)


def zero_copy(rows: Rows, sessions: dict[str, runtime.Session], images: np.ndarray, options: Any) -> None:
    import torch

    batch = images[: options.batches[-1]]
    tensor = torch.from_numpy(batch).cuda()
    torch.cuda.synchronize()
    sources: dict[str, Any] = {"host": batch, "torch": tensor}
    # torch's interface has version 2, which does not name a stream.
    sources["interface"] = SimpleNamespace(__cuda_array_interface__=tensor.__cuda_array_interface__)
    try:
        importlib.import_module("pycuda.autoprimaryctx")
        sources["pycuda"] = importlib.import_module("pycuda.gpuarray").to_gpu(batch)
    except Exception as error:  # pycuda's errors have no common base class
        rows.add("zero-copy", "pycuda", error=f"{type(error).__name__}: {error}")
    for name, session in sessions.items():
        expected = session.run(batch)
        for kind, source in sources.items():
            left = session.run_on_device(source)[session.backend.outputs[0].name]
            same = np.array_equal(session.run(source), expected) and np.array_equal(left.numpy(), expected)
            back = np.array_equal(torch.utils.dlpack.from_dlpack(left).cpu().numpy(), expected)
            rows.add("zero-copy", f"{name} {kind}", same_bits=same, torch_reads_output=back)
        with torch.cuda.stream(torch.cuda.Stream()):  # work that is still pending when the session is called
            torch.cuda._sleep(50_000_000)
            late = tensor * 1.0
            same = np.array_equal(session.run(late), expected)
            rows.add("zero-copy", f"{name} waits for torch's stream", same_bits=same)
        calls: Calls = {f"{name} {kind}": partial(session.run_on_device, source) for kind, source in sources.items()}
        report_times(rows, "zero-copy", len(batch), calls, options.seconds)


def threads(rows: Rows, engines: dict[str, Path], sessions: dict[str, runtime.Session], images: np.ndarray) -> None:
    for name, path in engines.items():
        for contexts in (1, 2, 4, 8):
            with runtime.load(path, engine=runtime.EngineOptions(contexts=contexts)) as session:
                share(rows, f"{name}, {contexts} contexts", session, images)
    for name in sessions.keys() - engines.keys():
        share(rows, name, sessions[name], images)


def share(rows: Rows, name: str, session: runtime.Session, images: np.ndarray) -> None:
    """Call a session from several threads, and count the results that differ from those of one thread."""
    batches = [images[start : start + 1 + start % 4] for start in range(16)]
    expected = [session.run(batch) for batch in batches]

    def count_wrong(first: int) -> int:
        places = [(first + number) % len(batches) for number in range(200)]
        return sum(not np.array_equal(session.run(batches[place]), expected[place]) for place in places)

    with ThreadPoolExecutor(THREADS) as pool:
        began = time.perf_counter()
        wrong = sum(pool.map(count_wrong, range(THREADS)))
        seconds = time.perf_counter() - began
    rows.add("threads", name, wrong=wrong, batches_per_s=THREADS * 200 / seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="efficientnet_b0", help="architecture, by its timm name")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds per measurement")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--eager", action="store_true", help="no comparison with compiled torch, which takes minutes")
    parser.add_argument("--json", type=Path, help="JSON file for the measurements")
    options = parser.parse_args()
    options.batches.sort()
    gpu = find_gpu()
    if gpu is None:
        print("this benchmark needs an NVIDIA GPU and its driver; none was found", file=sys.stderr)
        return 2
    rows = Rows()
    print(f"{gpu.name}, SM {gpu.sm}")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        files = files_of(options.arch, Path(folder))
        engines = engines_of(files, max(options.batches), rows)
        sessions = sessions_of(files, engines, rows, "numerics", stack)
        with runtime.load(files["fp32"], device="cpu") as session:
            shape = (max(64, *options.batches), 3, session.spec.preprocessing.height, session.spec.preprocessing.width)
        images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        parts = {
            "numerics": partial(numerics, rows, files, sessions, images),
            "latency": partial(latency, rows, options.arch, sessions, images, options),
            "graphs": partial(graphs, rows, engines, images, options),
            "zero-copy": partial(zero_copy, rows, sessions, images, options),
            "threads": partial(threads, rows, engines, sessions, images),
        }
        for name, part in parts.items():
            if name in options.parts:
                try:
                    part()
                except Exception as error:  # the other parts still run
                    rows.add(name, "failed", error=f"{type(error).__name__}: {error}")
    if options.json:
        options.json.write_text(json.dumps({"gpu": gpu.name, "sm": gpu.sm, "rows": rows.rows}, indent=1) + "\n")
    return 1 if any("error" in row or row.get("wrong") or row.get("same_bits") is False for row in rows.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
