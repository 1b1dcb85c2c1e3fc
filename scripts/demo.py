"""Train, export, build an engine and predict in one run, and print a table of the results.

    python scripts/demo.py                       EfficientNet-B3 on the embedded digits
    python scripts/demo.py --arch resnet18 --epochs 1 --out runs/quick

The script runs the advprop commands as subprocesses. It then classifies the held-out digits with
the checkpoint (in torch) and with both ONNX files (in ONNX Runtime, from PNG files).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import runtime
from export.source import load_source
from runtime.preprocessing import Preprocessor
from runtime.system.decode import decode
from train.data import ImageSet, embedded_digits

NO_ENGINE = 3
"""Exit code of an export that wrote the ONNX files but found no engine builder."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="efficientnet_b3")
    parser.add_argument("--epochs", type=int, help="epochs of training (default: the trainer's)")
    parser.add_argument("--out", type=Path, help="output folder (default: runs/demo-ARCH)")
    args = parser.parse_args()
    out = args.out or Path("runs") / f"demo-{args.arch}"
    console = Console()
    began = time.monotonic()
    train = [sys.executable, "-m", "train.run", "--arch", args.arch, "--out", str(out), "--resume", "auto"]
    for command in (
        train + (["--epochs", str(args.epochs)] if args.epochs else []),
        [sys.executable, "-m", "export.cli", str(out / "last.pt"), "--trt", "fp16"],
    ):
        console.print("$", *command[1:], style="bold", highlight=False, soft_wrap=True)
        done = subprocess.run(command, check=False)
        if done.returncode not in (0, NO_ENGINE):
            return done.returncode
    console.print(results(out))
    console.print(
        f"Finished in {time.monotonic() - began:.0f} s. Latency is the median of single images on this machine's CPU, "
        "from the preprocessed tensor to the logits; a CPU computes FP16 graphs in FP32. The engine needs an NVIDIA "
        "GPU to run.",
        highlight=False,
    )
    return 0


def results(out: Path) -> Table:
    """Return a table of accuracy on the held-out digits, size and latency of each model."""
    paths, labels = held_out_files(out / "held-out")
    source = load_source(out / "last.pt")
    images_NCHW = Preprocessor(source.spec.preprocessing)(paths)
    table = Table(title=f"{source.spec.arch}, {len(paths)} held-out images")
    for heading in ("", "accuracy", "MB", "ms per image"):
        table.add_column(heading, no_wrap=True, justify="right" if heading else "left")

    with torch.inference_mode():
        logits = torch.cat([source.model(part) for part in torch.from_numpy(images_NCHW).split(64)])
        checkpoint_ms = milliseconds(lambda: source.model(torch.from_numpy(images_NCHW[:1])))
    accuracy = float(np.mean(logits.argmax(1).numpy() == labels))
    weights = sum(tensor.nbytes for tensor in source.model.state_dict().values())
    table.add_row("checkpoint (weights)", f"{accuracy:.1%}", f"{weights / 1e6:.1f}", f"{checkpoint_ms:.1f}")
    for name in ("model.onnx", "model.fp16.onnx"):
        with runtime.load(out / name) as session:
            answers = [answer.index for answer in session.predict(paths)]
            latency = milliseconds(lambda session=session: session.run(images_NCHW[:1]))  # type: ignore[misc]
        size = (out / name).stat().st_size / 1e6
        table.add_row(name, f"{np.mean(np.asarray(answers) == labels):.1%}", f"{size:.1f}", f"{latency:.1f}")
    engine = out / "model.fp16.engine"
    if engine.exists():
        table.add_row(engine.name, "built", f"{engine.stat().st_size / 1e6:.1f}", "")
    else:
        table.add_row(engine.name, "no builder", "", "")
    return table


def held_out_files(folder: Path) -> tuple[list[Path], np.ndarray]:
    """Write the held-out digits as PNG files; return the files and their labels."""
    digits = embedded_digits().val
    assert isinstance(digits, ImageSet)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(len(digits)):
        path = folder / f"{number:03d}.png"
        decode(digits.images[number]).save(path)
        paths.append(path)
    return paths, np.asarray(digits.labels)


def milliseconds(call: Callable[[], object], warmup: int = 5, repeats: int = 30) -> float:
    """Return the median time of `call`, in milliseconds."""
    times: Sequence[float] = [timed(call) for _ in range(warmup + repeats)][warmup:]
    return 1000 * statistics.median(times)


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
