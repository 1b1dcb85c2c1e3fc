"""Measure the overhead of a `Session` over ONNX Runtime, and the throughput of the batcher.

    python -m benchmarks.runtime_overhead            about eight minutes on two idle cores
    python -m benchmarks.runtime_overhead --quick    about two minutes, with less precise ratios

The network is EfficientNet-B0 with random weights at 224 pixels.

- run: time of `Session.run` ÷ a bare `InferenceSession.run` with the same file and settings. Goal:
  ≤ 1.03.
- predict: time of `Session.predict` from JPEG bytes ÷ the same steps (decode, resize, normalize,
  run, softmax) written with Pillow and NumPy. Goal: ≤ 1.05.
- memory: size of the process during 20,000 calls of a tiny model, half `run`, half `submit`. Goal:
  constant.
- batcher: throughput of 64 clients that submit one image at a time ÷ throughput of the bare `run`
  with the best fixed batch size. Goal: ≥ 0.9.

Peers alternate call by call in one process, so changes of the machine's speed affect both. A ratio
is the median over pairs of adjacent calls, with the quartiles in brackets.
"""

from __future__ import annotations

import argparse
import gc
import io
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from PIL import Image
from sklearn.datasets import load_sample_images

import runtime
from benchmarks.export_time import write_checkpoint
from export.config import ExportConfig
from export.pipeline import export_checkpoint

CLIENTS = 64


def bare_session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def interleaved(ours: Callable[[], object], theirs: Callable[[], object], pairs: int) -> tuple[list[float], ...]:
    """Return the seconds of each call after a warm-up. The order alternates from pair to pair."""
    times: tuple[list[float], list[float]] = ([], [])
    calls = (ours, theirs)
    for number in range(-3, pairs):
        for which in (0, 1) if number % 2 else (1, 0):
            seconds = timed(calls[which])
            if number >= 0:
                times[which].append(seconds)
    return times


def report(name: str, times: tuple[list[float], ...], goal: str) -> None:
    ours, theirs = times
    low, middle, high = statistics.quantiles([mine / other for mine, other in zip(ours, theirs, strict=True)], n=4)
    print(
        f"{name:22} {1000 * statistics.median(ours):9.2f} ms {1000 * statistics.median(theirs):9.2f} ms   "
        f"{middle:.3f} ({low:.3f}–{high:.3f})   goal {goal}",
        flush=True,
    )


def by_hand(bare: ort.InferenceSession, spec: runtime.ModelSpec, files: list[bytes]) -> np.ndarray:
    """Classify images with code written for this one model; return probabilities, (N, K)."""
    plan = spec.preprocessing
    scaled = int(plan.height / plan.crop_pct)
    mean, std = np.asarray(plan.mean, np.float32), np.asarray(plan.std, np.float32)
    images = []
    for data in files:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        ratio = scaled / min(image.size)
        image = image.resize([round(side * ratio) for side in image.size], Image.Resampling[plan.interpolation.upper()])
        left, top = (image.width - plan.width) // 2, (image.height - plan.height) // 2
        cropped = np.asarray(image.crop((left, top, left + plan.width, top + plan.height)), np.float32)
        images.append(((cropped / 255 - mean) / std).transpose(2, 0, 1))
    (logits,) = bare.run(None, {"input": np.stack(images)})
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


def jpegs(count: int) -> list[bytes]:
    files = []
    for image in load_sample_images().images:  # two photographs, 640 by 427 pixels
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return (files * count)[:count]


def measure_memory(calls: int) -> None:
    text = """<ir_version: 9, opset_import: ["" : 20]> g (float[n, 3, 4, 4] input) => (float[n, 3] logits)
    { p = GlobalAveragePool(input) logits = Flatten(p) }"""
    images = np.ones((2, 3, 4, 4), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(onnx.parser.parse_model(text), Path(folder) / "tiny.onnx")
        with runtime.load(Path(folder) / "tiny.onnx", threads=1, batching=runtime.Batching(max_delay_us=0)) as session:
            sizes = []
            for _ in range(6):
                for _ in range(calls // 10):
                    session.run(images)
                    session.submit(images).result()
                gc.collect()
                sizes.append(resident_mb())
    print(f"{'memory':22} {' '.join(f'{size:.1f}' for size in sizes)} MB, each after another {calls // 5} calls")


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def fixed_rate(bare: ort.InferenceSession, images: np.ndarray, batch: int) -> float:
    """Return the images per second of a bare session with a fixed batch size."""
    began = time.perf_counter()
    for start in range(0, len(images), batch):
        bare.run(None, {"input": images[start : start + batch]})
    return len(images) / (time.perf_counter() - began)


def batcher_rate(session: runtime.Session, images: np.ndarray) -> float:
    """Return the images per second of clients that each have one request in flight."""
    numbers = iter(range(len(images)))
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            session.submit(images[number : number + 1]).result()

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(images) / (time.perf_counter() - began)


def measure_overhead(path: Path, threads: int, pairs: int) -> None:
    bare = bare_session(path, threads)
    print(f"{'':22} {'ours':>12} {'bare':>12}   ratio")
    with runtime.load(path, device="cpu", threads=threads) as session:
        for batch in (1, 8):
            images = np.random.default_rng(0).normal(size=(batch, 3, 224, 224)).astype(np.float32)
            ours, theirs = partial(session.run, images), partial(bare.run, None, {"input": images})
            report(f"run, batch {batch}", interleaved(ours, theirs, max(pairs // batch, 20)), "≤ 1.03")
            checks = [timed(partial(session.backend.check, images)) for _ in range(200)]
            print(f"{'  of which checks':22} {1e3 * statistics.median(checks):9.3f} ms")
        for batch in (1, 8):
            files = jpegs(batch)
            predict, peer = partial(session.predict, files), partial(by_hand, bare, session.spec, files)
            report(f"predict, {batch} JPEG", interleaved(predict, peer, max(pairs // batch, 20)), "≤ 1.05")


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure_batcher(path: Path, threads: int, images: int, rounds: int) -> None:
    batch_NCHW = np.random.default_rng(0).normal(size=(images, 3, 224, 224)).astype(np.float32)
    bare = bare_session(path, threads)
    sizes = (1, 4, 8, 16, 32)
    best = max(sizes, key=lambda size: fixed_rate(bare, batch_NCHW, size))
    with runtime.load(path, device="cpu", threads=threads) as session:
        usual = session.batching.max_batch
    limits = sorted({best, usual})
    fixed: dict[int, list[float]] = {size: [] for size in sizes}
    ours: dict[int, list[float]] = {limit: [] for limit in limits}
    for _ in range(rounds):
        for size, rates in fixed.items():
            rates.append(fixed_rate(bare, batch_NCHW, size))
        for limit, rates in ours.items():
            batching = runtime.Batching(max_batch=limit)
            with runtime.load(path, device="cpu", threads=threads, warm_up=(1, limit), batching=batching) as session:
                rates.append(batcher_rate(session, batch_NCHW))
    for size, rates in fixed.items():
        print(f"{f'fixed batch {size}':22} {statistics.median(rates):9.1f} images/s")
    for limit, rates in ours.items():
        ratios = [mine / max(others) for mine, *others in zip(rates, *fixed.values(), strict=True)]
        print(
            f"{f'batcher, at most {limit}':22} {statistics.median(rates):9.1f} images/s   "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f}) of the round's best   goal ≥ 0.9"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="make fewer calls")
    parser.add_argument("--only-batcher", action="store_true", help="measure the batcher only")
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads of both sides (default: ONNX Runtime's own number)"
    )
    arguments = parser.parse_args()
    if not arguments.only_batcher:
        measure_memory(4_000 if arguments.quick else 20_000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint("efficientnet_b0", folder / "checkpoint.pt")
        path = export_checkpoint(folder / "checkpoint.pt", ExportConfig(out=folder)).onnx
        if not arguments.only_batcher:
            measure_overhead(path, arguments.threads, 60 if arguments.quick else 400)
        measure_batcher(path, arguments.threads, 128 if arguments.quick else 512, 3 if arguments.quick else 7)


if __name__ == "__main__":
    main()
