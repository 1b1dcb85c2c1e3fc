"""Logits of EfficientNet-Lite0, with its real weights, at each stage of an export."""

from __future__ import annotations

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


def stage_logits(data: Path, folder: Path, images: int | None = None) -> dict[str, NDArray[np.float32]]:
    """Export into `folder`, and return the logits of the first `images` images at each stage."""
    paths, _ = labeled_images(data)
    paths = paths[: images or len(paths)]
    weights = save_lite0(folder / "lite0.pth")
    plain = export_checkpoint(SOURCE, ExportConfig(weights=weights, data=data, out=folder / "plain", precision="fp16"))
    assert plain.reduced_onnx is not None
    pixels = export_checkpoint(
        SOURCE, ExportConfig(weights=weights, data=data, out=folder / "uint8", input_form="uint8 NHWC")
    )
    return {
        "torch": torch_logits(weights, paths),
        "ONNX FP32": session_logits(plain.onnx, paths),
        "ONNX FP16": rounded_logits(plain.reduced_onnx, paths),
        "ONNX FP32, uint8 in": session_logits(pixels.onnx, paths),
    }
