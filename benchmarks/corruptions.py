"""Compare the corruptions with the original code, and their speed with imagecorruptions-imaug.

    python -m benchmarks.corruptions --reference corruptions_ref.npz    all cells, ten seconds
    python -m benchmarks.corruptions --peer-python peer/bin/python      speed, about two minutes

`tests/support/corruption_reference.py` describes the reference file and the comparison.

The peer needs a separate environment, because it installs opencv-python. Both run in turn, in
processes with one thread. At 32 pixels both use the parameters for ImageNet, because the peer has
no others; another column shows advprop with the parameters for CIFAR.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDS, REPEATS = 4, 5
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")


def print_cells(path: Path) -> None:
    """Print a table that compares every cell of the reference file."""
    from runtime.evaluate.corruptions import CORRUPTIONS
    from runtime.evaluate.corruptions.corrupt import DETERMINISTIC
    from tests.support.corruption_reference import SEVERITIES, compare

    print(
        "| | severity | largest difference | equal values | mean, replayed draws | std | mean, our draws | std "
        "| one draw |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    with np.load(path) as reference:
        for name in CORRUPTIONS:
            for severity in SEVERITIES:
                cell = compare(reference, name, severity)
                columns = _columns(cell, name, name in DETERMINISTIC)
                print(f"| {name} | {severity} |", " | ".join(columns), "|", flush=True)


def _columns(cell: dict[str, Any], name: str, deterministic: bool) -> list[str]:
    exact = ["–", "–"] if name == "impulse_noise" else [str(cell["levels"]), f"{cell['same']:.2%}"]
    replay = ["–", "–"] if name == "impulse_noise" else [f"{ratio:.3f}" for ratio in cell["replay"]]
    own = ["", "", ""] if deterministic else [*(f"{ratio:.3f}" for ratio in cell["own"]), f"± {cell['noise']:.1%}"]
    return [*exact, *replay, *own]


def photograph(side: int) -> NDArray[np.uint8]:
    """Return the center of scikit-learn's photograph of a temple, uint8 RGB."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    center = Image.fromarray(load_sample_image("china.jpg")[:, 106:533])
    return np.array(center.resize((side, side), Image.Resampling.BICUBIC))


def measure(who: str, images: Path) -> dict[str, float]:
    """Return milliseconds per image of every cell, the median of `REPEATS` calls.

    This runs in a separate process, with either advprop or the peer.
    """
    import cv2

    cv2.setNumThreads(1)
    call = _import_ours() if who == "ours" else _import_peer()
    times = {}
    with np.load(images) as stored:
        names = [str(name) for name in stored["names"]]
        cases = {"224": stored["224"], "32": stored["32"]}
    for name in names:
        for case, image in cases.items():
            for table in ("imagenet", "cifar") if who == "ours" and case == "32" else ("imagenet",):
                for severity in range(1, 6):
                    times[f"{name}/{case}/{table}/{severity}"] = _median_ms(call, image, name, severity, table)
    return times


def _median_ms(call: Callable[..., Any], image: NDArray[np.uint8], name: str, severity: int, table: str) -> float:
    call(image, name, severity, table)  # fills caches
    repeats = REPEATS if image.shape[0] > 32 else 10 * REPEATS
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        call(image, name, severity, table)
        samples.append(time.perf_counter() - start)
    return 1000 * float(np.median(samples))


def _import_ours() -> Callable[..., Any]:
    from runtime.evaluate.corruptions import corrupt

    return lambda image, name, severity, table: corrupt(image, name, severity, table=table)


def _import_peer() -> Callable[..., Any]:
    import imagecorruptions

    return lambda image, name, severity, table: imagecorruptions.corrupt(image, severity, name)


def print_speed(peer_python: str, folder: Path) -> None:
    """Print a table of milliseconds per image, ours and the peer's."""
    from runtime.evaluate.corruptions import CORRUPTIONS, EXTRAS

    images = folder / "images.npz"
    arrays: dict[str, Any] = {str(side): photograph(side) for side in (224, 32)}
    np.savez(images, names=np.array([*CORRUPTIONS, *EXTRAS]), **arrays)
    best: dict[str, dict[str, float]] = {"ours": {}, "peer": {}}
    for _ in range(ROUNDS):
        for who, python in (("ours", sys.executable), ("peer", peer_python)):
            for cell, ms in _run_worker(who, python, images).items():
                best[who][cell] = min(ms, best[who].get(cell, ms))
    print("| ms per image, mean over severities | 224 px | peer | ratio | 32 px | peer | ratio | 32 px, CIFAR table |")
    print("|---|---|---|---|---|---|---|---|")
    totals = np.zeros(5)
    for name in (*CORRUPTIONS, *EXTRAS):
        row = np.array(
            [
                _mean(best["ours"], f"{name}/224/imagenet"),
                _mean(best["peer"], f"{name}/224/imagenet"),
                _mean(best["ours"], f"{name}/32/imagenet"),
                _mean(best["peer"], f"{name}/32/imagenet"),
                _mean(best["ours"], f"{name}/32/cifar"),
            ]
        )
        print(_speed_row(name, row))
        if name in CORRUPTIONS:
            totals += row
    print(_speed_row("**all fifteen**", totals))


def _mean(times: dict[str, float], prefix: str) -> float:
    return float(np.mean([times[f"{prefix}/{severity}"] for severity in range(1, 6)]))


def _speed_row(name: str, ms: NDArray[np.float64]) -> str:
    large, peer_large, small, peer_small, cifar = ms
    return (
        f"| {name} | {large:.2f} | {peer_large:.2f} | {large / peer_large:.2f} "
        f"| {small:.3f} | {peer_small:.3f} | {small / peer_small:.2f} | {cifar:.3f} |"
    )


def _run_worker(who: str, python: str, images: Path) -> dict[str, float]:
    command = [python, __file__, "--worker", who, "--images", str(images)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **THREADS})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    times: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="Outputs of the original code, .npz.")
    parser.add_argument("--peer-python", help="Python interpreter with imagecorruptions-imaug.")
    parser.add_argument("--worker", choices=["ours", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--images", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker, arguments.images)))
        return
    if not arguments.reference and not arguments.peer_python:
        parser.error("pass --reference, --peer-python or both")
    if arguments.reference:
        print_cells(arguments.reference)
    if arguments.peer_python:
        with tempfile.TemporaryDirectory() as folder:
            print_speed(arguments.peer_python, Path(folder))


if __name__ == "__main__":
    main()
