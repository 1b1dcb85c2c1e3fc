"""Measure the top-1 accuracy of EfficientNet-Lite0 at each stage of an export.

    python benchmarks/lite0_export.py --data imagenet_dev    500 images: about a minute on two cores

`--data` contains `WNID/*.JPEG`. Each row uses the preprocessing of the file's own spec:

    torch                 the stock timm model with timm's transform
    ONNX FP32             the exported file in ONNX Runtime
    ONNX FP16             the FP16 file with every FP16 tensor rounded as on a GPU
    ONNX FP32, uint8 in   a file whose input is uint8 pixels
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import runtime
from export.config import ExportConfig
from export.pipeline import export_checkpoint
from runtime.graph.rounding import with_roundings
from runtime.preprocessing import Preprocessor
from tests.support.real_weights import ARCH, SOURCE, labeled_images, save_lite0

BATCH = 8


def torch_logits(weights: Path, paths: list[Path]) -> NDArray[np.float32]:
    model = timm.create_model(ARCH).eval()
    model.load_state_dict(torch.load(weights, weights_only=True), strict=True)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        rows = []
        for start in range(0, len(paths), BATCH):
            images = [transform(Image.open(path).convert("RGB")) for path in paths[start : start + BATCH]]
            rows.append(model(torch.stack(images)).numpy())
    return np.concatenate(rows)


def session_logits(file: Path, paths: list[Path]) -> NDArray[np.float32]:
    with runtime.load(file, device="cpu") as session:
        spec = session.spec
        starts = range(0, len(paths), BATCH)
        return np.concatenate([session.run(Preprocessor.of(spec)(paths[start : start + BATCH])) for start in starts])


def rounded_logits(file: Path, paths: list[Path]) -> NDArray[np.float32]:
    with runtime.load(file, device="cpu") as session:
        preprocessing = session.spec.preprocessing
    graph = with_roundings(onnx.load(file)).SerializeToString()
    run = ort.InferenceSession(graph, providers=["CPUExecutionProvider"]).run
    rows = []
    for start in range(0, len(paths), BATCH):
        batch = Preprocessor(preprocessing)(paths[start : start + BATCH])
        rows.append(run(None, {"input": batch})[0])
    return np.concatenate(rows)


def measure(data: Path, folder: Path, images: int | None = None) -> dict[str, NDArray[np.float32]]:
    """Export into `folder`; return the logits of each stage for the first `images` images."""
    paths, _ = labeled_images(data)
    paths = paths[: images or len(paths)]
    weights = save_lite0(folder / "lite0.pth")
    plain = export_checkpoint(SOURCE, ExportConfig(weights=weights, data=data, out=folder / "plain", precision="fp16"))
    pixels = export_checkpoint(
        SOURCE, ExportConfig(weights=weights, data=data, out=folder / "uint8", input_form="uint8 NHWC")
    )
    return {
        "torch": torch_logits(weights, paths),
        "ONNX FP32": session_logits(plain.onnx, paths),
        "ONNX FP16": rounded_logits(plain.reduced_onnx, paths),
        "ONNX FP32, uint8 in": session_logits(pixels.onnx, paths),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    _, labels = labeled_images(arguments.data)
    with tempfile.TemporaryDirectory() as folder:
        stages = measure(arguments.data, Path(folder))
    reference = stages["torch"]
    print(f"{ARCH}, {len(labels)} images")
    print(f"{'':20} {'top-1':>6} {'agrees with torch':>18} {'max |Δlogit|':>13}")
    for name, logits in stages.items():
        classes = logits.argmax(1)
        print(
            f"{name:20} {(classes == np.asarray(labels)).mean():6.1%} "
            f"{(classes == reference.argmax(1)).mean():18.1%} {np.abs(logits - reference).max():13.1e}"
        )


if __name__ == "__main__":
    main()
