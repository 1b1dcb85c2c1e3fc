"""Corruptions: how near they are to the original's pixels, and how fast beside the package imagecorruptions-imaug.

    python benchmarks/corruptions.py --reference corruptions_ref.npz      all cells, ten seconds
    python benchmarks/corruptions.py --peer-python peer/bin/python        speed, about two minutes

The reference file has outputs of the original code at 224 pixels: arrays `clean/J` and `CORRUPTION/SEVERITY/J`, made
after `np.random.seed(100 * J + SEVERITY)`. So the original's own draws can be drawn again, and random corruptions be
compared pixel by pixel too; only impulse noise came from another, unseeded generator. What our own draws give is
compared by its statistics, over eight draws an image.

The peer, which needs an environment of its own (it installs opencv-python), and we run in processes of one thread each,
in turns. At 32 pixels both use the parameters for ImageNet, the only ones that the peer has; ours for CIFAR are beside
them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SEVERITIES = (1, 3, 5)
"""Those in the reference file."""
IMAGES = (0, 1)
ROUNDS, REPEATS = 4, 5
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")


class Replay:
    """The original's generator behind the methods of NumPy's present one."""

    def __init__(self, seed: int) -> None:
        self.legacy = np.random.RandomState(seed)

    def standard_normal(self, size: Any, dtype: Any = np.float64) -> NDArray[Any]:
        return self.legacy.normal(size=size).astype(dtype)

    def random(self, size: Any, dtype: Any = np.float64) -> NDArray[Any]:
        return self.legacy.random_sample(size).astype(dtype)

    def uniform(self, low: float, high: float, size: Any = None) -> Any:
        return self.legacy.uniform(low, high, size)

    def integers(self, low: int, high: int, size: Any = None) -> Any:
        return self.legacy.randint(low, high, size=size)

    def poisson(self, means: NDArray[np.float64]) -> NDArray[Any]:
        return self.legacy.poisson(means)


def replayed(image_HWC: NDArray[np.uint8], name: str, severity: int, seed: int) -> NDArray[np.uint8]:
    """Our corruption with what the original draws after `np.random.seed(seed)`."""
    from runtime.evaluate.corruptions import TABLES
    from runtime.evaluate.corruptions.corrupt import FIXED, function_of

    arguments = TABLES["imagenet"][name][severity - 1]
    random = {} if name in FIXED else {"random": Replay(seed)}
    return function_of(name)(image_HWC, *arguments, **random)


class Statistics:
    """Sums over images of the difference to the clean image."""

    def __init__(self) -> None:
        self.magnitude = 0.0
        self.spread = np.zeros(3)
        self.count = 0

    def add(self, image_HWC: NDArray[np.uint8], clean_HWC: NDArray[np.uint8]) -> None:
        difference = image_HWC.astype(np.float64) - clean_HWC
        self.magnitude += np.abs(difference).mean()
        self.spread += difference.std(axis=(0, 1))
        self.count += 1

    def against(self, other: Statistics) -> tuple[float, float]:
        """Ratios: of the mean magnitude, and of that channel's standard deviation which is farthest from 1."""
        share = other.count / self.count
        spreads = self.spread / other.spread * share
        return self.magnitude / other.magnitude * share, float(spreads[np.abs(spreads - 1).argmax()])


def compare(reference: Mapping[str, NDArray[np.uint8]], name: str, severity: int, draws: int = 8) -> dict[str, Any]:
    """One cell over both images.

    Returns:
        `levels`: the largest difference to the reference, with its own draws; `same`: the share of equal values;
        `replay` and `own`: (magnitude, standard deviation) as ratios to the reference's, with its draws and with
        ours; `noise`: how far one of our draws over both images differs from another in magnitude (standard
        deviation, as a share of the mean).
    """
    from runtime.evaluate.corruptions import corrupt

    theirs, ours, replay = Statistics(), Statistics(), Statistics()
    single = np.zeros((draws, len(IMAGES)))
    levels, same = 0, 0.0
    for j in IMAGES:
        clean, expected = reference[f"clean/{j}"], reference[f"{name}/{severity}/{j}"]
        theirs.add(expected, clean)
        found = replayed(clean, name, severity, 100 * j + severity)
        replay.add(found, clean)
        distance = np.abs(found.astype(int) - expected)
        levels, same = max(levels, int(distance.max())), same + float((distance == 0).mean()) / len(IMAGES)
        for draw in range(draws):
            before = ours.magnitude
            ours.add(corrupt(clean, name, severity, key=f"{j}/{draw}"), clean)
            single[draw, j] = ours.magnitude - before
    totals = single.sum(axis=1)
    return {
        "levels": levels,
        "same": same,
        "replay": replay.against(theirs),
        "own": ours.against(theirs),
        "noise": float(totals.std() / totals.mean()),
    }


def print_cells(path: Path) -> None:
    from runtime.evaluate.corruptions import CORRUPTIONS
    from runtime.evaluate.corruptions.corrupt import FIXED

    print(
        "| | severity | largest difference | equal values | mean, its draws | std | mean, our draws | std | one draw |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    with np.load(path) as reference:
        for name in CORRUPTIONS:
            for severity in SEVERITIES:
                cell = compare(reference, name, severity)
                print(f"| {name} | {severity} |", " | ".join(_columns(cell, name, name in FIXED)), "|", flush=True)


def _columns(cell: dict[str, Any], name: str, fixed: bool) -> list[str]:
    exact = ["–", "–"] if name == "impulse_noise" else [str(cell["levels"]), f"{cell['same']:.2%}"]
    replay = ["–", "–"] if name == "impulse_noise" else [f"{ratio:.3f}" for ratio in cell["replay"]]
    own = ["", "", ""] if fixed else [*(f"{ratio:.3f}" for ratio in cell["own"]), f"± {cell['noise']:.1%}"]
    return [*exact, *replay, *own]


def photograph(side: int) -> NDArray[np.uint8]:
    """The middle of scikit-learn's photograph of a temple, uint8 RGB."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    middle = Image.fromarray(load_sample_image("china.jpg")[:, 106:533])
    return np.array(middle.resize((side, side), Image.Resampling.BICUBIC))


def work(who: str, images: Path) -> dict[str, float]:
    """Milliseconds of every cell, the median of `REPEATS`. Runs in a process of its own, ours or the peer's."""
    import cv2

    cv2.setNumThreads(1)
    call = _ours() if who == "ours" else _theirs()
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
    call(image, name, severity, table)  # what is prepared once
    repeats = REPEATS if image.shape[0] > 32 else 10 * REPEATS
    samples = []
    for _ in range(repeats):
        began = time.perf_counter()
        call(image, name, severity, table)
        samples.append(time.perf_counter() - began)
    return 1000 * float(np.median(samples))


def _ours() -> Callable[..., Any]:
    from runtime.evaluate.corruptions import corrupt

    return lambda image, name, severity, table: corrupt(image, name, severity, table=table)


def _theirs() -> Callable[..., Any]:
    import imagecorruptions

    return lambda image, name, severity, table: imagecorruptions.corrupt(image, severity, name)


def print_speed(peer_python: str, folder: Path) -> None:
    from runtime.evaluate.corruptions import CORRUPTIONS, EXTRAS

    images = folder / "images.npz"
    np.savez(images, names=np.array([*CORRUPTIONS, *EXTRAS]), **{str(side): photograph(side) for side in (224, 32)})
    best: dict[str, dict[str, float]] = {"ours": {}, "peer": {}}
    for _ in range(ROUNDS):
        for who, python in (("ours", sys.executable), ("peer", peer_python)):
            for cell, ms in _run_worker(who, python, images).items():
                best[who][cell] = min(ms, best[who].get(cell, ms))
    print("| ms an image, severities averaged | 224 px | peer | ratio | 32 px | peer | ratio | 32 px, CIFAR's |")
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
    print(_speed_row("**the fifteen**", totals))


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
    parser.add_argument("--peer-python", help="A Python that has imagecorruptions-imaug.")
    parser.add_argument("--worker", choices=["ours", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--images", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(arguments.worker, arguments.images)))
        return
    if not arguments.reference and not arguments.peer_python:
        parser.error("give --reference, --peer-python or both")
    if arguments.reference:
        print_cells(arguments.reference)
    if arguments.peer_python:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            print_speed(arguments.peer_python, Path(folder))


if __name__ == "__main__":
    main()
