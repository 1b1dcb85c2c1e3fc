"""Measure the accuracy of an export for one network of each architecture family.

    python -m benchmarks.families --data imagenet_dev    twelve networks, about seven minutes on two cores

The script exports each network at its own image size to FP32 and FP16 ONNX and builds an FP16
engine with TensorRT-RTX. EfficientNet-Lite0 has its ImageNet weights and is compared on all images
of `--data`. No other trained weights are available as a package. The other networks have random
weights, ten classes, BatchNorm statistics of the images and scales from 0.8 to 1.2, and are
compared on 64 images. For random weights, only the differences of the logits are meaningful. Errors
are the largest |Δlogit| divided by the largest |logit|.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import onnx
import timm
import torch
from torch import nn

from export.config import EngineConfig, ExportConfig
from export.pipeline import ExportResult, export_checkpoint
from export.source import load_source
from export.verify import Parity, batches, compare, graph_logits, torch_logits
from runtime.graph.rounding import with_roundings
from tests.support.real_weights import ARCH, save_lite0

NETS = (
    "efficientnet_b0",
    "tf_efficientnet_b0",
    "tf_efficientnetv2_b0",
    "tf_efficientnet_lite0",
    "resnet18",
    "resnext26ts",
    "regnety_002",
    "mobilenetv3_small_050",
    "densenet121",
    "inception_v3",
    "nf_regnet_b0",
    "convnext_atto",
)


def save_random(arch: str, data: Path, path: Path) -> None:
    """Save random weights with BatchNorm statistics of the images, as after training."""
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=10)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.8, 1.2)
        nn.init.normal_(norm.bias, 0, 0.1)
        norm.momentum = None  # average over all batches
    torch.save(model.state_dict(), path)
    if norms:
        source = load_source(path, arch, data=data)
        model.train()
        with torch.no_grad():
            images = torch.cat([torch.from_numpy(batch) for batch in batches(source)])
            for batch in images.split(32):
                model(batch)
        torch.save(model.state_dict(), path)


def on_all_images(result: ExportResult, weights: Path, arch: str, data: Path) -> tuple[Parity, Parity]:
    """Return both parities of `result`, measured on all images of `data`."""
    source = load_source(weights, arch, data=data, images=1_000_000)
    full = graph_logits(onnx.load(result.onnx), source)
    assert result.reduced_onnx is not None
    half = graph_logits(with_roundings(onnx.load(result.reduced_onnx)), source)
    return compare(torch_logits(source), full), compare(full, half)


def measure(arch: str, data: Path, folder: Path) -> None:
    weights = folder / f"{arch}.pth"
    real = arch == ARCH
    if real:
        save_lite0(weights)
    else:
        save_random(arch, data, weights)
    result = export_checkpoint(
        weights, ExportConfig(arch=arch, data=data, out=folder / arch, precision="fp16", engine=EngineConfig(sm=(86,)))
    )
    assert result.reduced_onnx is not None and result.reduced_parity is not None and result.engine is not None
    full, half = on_all_images(result, weights, arch, data) if real else (result.onnx_parity, result.reduced_parity)
    ops = Counter(node.op_type for node in onnx.load(result.reduced_onnx).graph.node)
    print(
        f"| {arch} | {'real' if real else 'random'} | {full.images} | {full.relative:.1e} | {half.relative:.1e} | "
        f"{half.agreement:.1%} | {ops['BatchNormalization']} | {ops['Cast']} | {len(result.kept_fp32)} | "
        f"{result.engine.stat().st_size / 1e6:.1f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Images, e.g. WNID/*.JPEG.")
    parser.add_argument("--arch", nargs="+", default=list(NETS))
    arguments = parser.parse_args()
    print("| network | weights | images | FP32 | FP16 | same top-1 | BN nodes | Casts | in FP32 | engine MB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for arch in arguments.arch:
        with tempfile.TemporaryDirectory() as folder:
            measure(arch, arguments.data, Path(folder))


if __name__ == "__main__":
    main()
