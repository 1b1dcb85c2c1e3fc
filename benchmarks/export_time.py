"""Compare the time of a whole export with a bare `torch.onnx.export` of the same network.

    python -m benchmarks.export_time    three networks, about seven minutes on two cores

    ours    read a checkpoint, write FP32 and FP16 files, verify both on 64 images; no engine
    peer    `torch.onnx.export` with its defaults (dynamo, optimized) into one unverified file
    bound   the peer plus the runs that a verification needs: 64 images through torch, and
            twice through ONNX Runtime

The three take turns in rounds. A ratio compares times of the same round; its median, minimum and
maximum over the rounds are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import onnxruntime as ort
import timm
import torch
from timm.data import resolve_model_data_config

from export.config import ExportConfig
from export.pipeline import export_checkpoint
from export.source import timm_spec
from train.checkpoint import save_checkpoint

NETS = ("efficientnet_b0", "efficientnet_b3", "resnet50")
IMAGES = 64
BATCH = 4  # the fastest batch size for all three networks on the test machine


def write_checkpoint(arch: str, path: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(arch).eval()
    spec = timm_spec(model, arch)
    size = (IMAGES, spec.preprocessing.height, spec.preprocessing.width, 3)
    images = torch.randint(0, 256, size, dtype=torch.uint8)
    save_checkpoint(
        path,
        {
            "arch": arch,
            "model_kwargs": {"num_classes": 1000},
            "recipe": "advprop",
            "spec": spec.to_json(),
            "state_dict": model.state_dict(),
            "epoch": 1,
            "step": 1,
            "sample": {"images": images, "labels": torch.zeros(IMAGES, dtype=torch.int64)},
        },
    )
    return model


def bare(model: torch.nn.Module, size: tuple[int, ...], path: Path) -> None:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.zeros(2, *size),),
            str(path),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )


def bare_passes(model: torch.nn.Module, size: tuple[int, ...], path: Path) -> None:
    images = torch.rand(BATCH, *size)
    with torch.inference_mode():
        for _ in range(IMAGES // BATCH):
            model(images)
    for _ in ("FP32", "FP16"):
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        for _ in range(IMAGES // BATCH):
            session.run(None, {name: images.numpy()})


def measure(arch: str, rounds: int, folder: Path) -> None:
    checkpoint = folder / "checkpoint.pt"
    model = write_checkpoint(arch, checkpoint)
    size = resolve_model_data_config(model)["input_size"]
    peer, bound, ours = [], [], []
    for _ in range(rounds):
        began = time.perf_counter()
        bare(model, size, folder / "bare.onnx")
        exported = time.perf_counter()
        bare_passes(model, size, folder / "bare.onnx")
        passed = time.perf_counter()
        export_checkpoint(checkpoint, ExportConfig(out=folder / "ours", precision="fp16"))
        ended = time.perf_counter()
        peer.append(exported - began)
        bound.append(passed - began)
        ours.append(ended - passed)
    print(
        f"{arch:16} {size[-1]:4} {statistics.median(peer):10.1f} {statistics.median(bound):10.1f} "
        f"{statistics.median(ours):10.1f}   {_ratio(ours, peer)}   {_ratio(ours, bound)}",
        flush=True,
    )


def _ratio(ours: list[float], other: list[float]) -> str:
    ratios = [mine / theirs for mine, theirs in zip(ours, other, strict=True)]
    return f"{statistics.median(ratios):5.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=list(NETS))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{'':16} {'px':>4} {'peer s':>10} {'bound s':>10} {'ours s':>10}   {'÷ peer':18}   ÷ bound")
    for arch in arguments.arch:
        with tempfile.TemporaryDirectory() as folder:
            measure(arch, arguments.rounds, Path(folder))


if __name__ == "__main__":
    main()
