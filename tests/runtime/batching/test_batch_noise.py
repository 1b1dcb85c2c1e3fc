"""How much the outputs of a real network depend on the other images in the batch."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import runtime
from export.to_onnx import to_onnx
from runtime.graph.model import save_onnx
from runtime.spec import ModelSpec, Preprocessing

BOUND = 1e-5
"""Bound on the difference, relative to the largest logit. The order of float32 sums causes about
1e-6."""


@pytest.mark.slow
def test_the_effect_of_the_batch_size_is_bounded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv3_small_050", num_classes=10).eval()
    preprocessing = Preprocessing(
        height=64, width=64, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0
    )
    spec = ModelSpec(arch="mobilenetv3_small_050", classes=tuple("abcdefghij"), preprocessing=preprocessing)
    save_onnx(to_onnx(model, spec), tmp_path / "m.onnx")
    images = np.random.default_rng(0).normal(size=(48, 3, 64, 64)).astype(np.float32)
    batching = runtime.Batching(max_batch=16, max_delay_us=2000)
    with runtime.load(tmp_path / "m.onnx", threads=1, batching=batching) as session:
        alone = np.concatenate([session.run(image[None]) for image in images])
        scale = np.abs(alone).max()
        for size in (2, 3, 8, 16, 48):
            together = np.concatenate([session.run(images[at : at + size]) for at in range(0, 48, size)])
            assert np.abs(together - alone).max() <= BOUND * scale, size
        futures = [session.submit(images[at : at + 3]) for at in range(0, 48, 3)]
        batched = np.concatenate([future.result(30) for future in futures])
        assert np.abs(batched - alone).max() <= BOUND * scale
        assert session.stats.batcher.mean_batch > 3
        print(f"largest difference {np.abs(batched - alone).max() / scale:.1e} of the largest logit")
