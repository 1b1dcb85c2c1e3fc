"""Measure what re-parameterization saves: convolutions, file size, latency and FP16 error.

    python -m benchmarks.reparameterize    five networks, about five minutes on two cores

Each network is exported twice with equal weights: as it was trained, and in its inference form, as
`advprop-export` does. ONNX Runtime times both files on the CPU, one image, in interleaved rounds.
Latency is the median of the rounds; the ratio is the median of the ratios of the same round.
Weights are random, with BatchNorm statistics of random images. Errors are the largest |Δlogit|
divided by the largest |logit|: of the inference form relative to the trained network, and of the
FP16 graphs, with every tensor rounded, relative to the FP32 graph. "in FP32": nodes that stay in
FP32 until the FP16 error is at most 2e-2; above it, the export fails.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
import timm
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from export.inference_form import inference_form
from export.reduce import reduce_precision
from export.source import timm_spec
from export.to_onnx import to_onnx
from export.verify import TOLERANCE, compare
from runtime.graph.collect import collect
from runtime.graph.model import run_batches

NETS = ("mobileone_s0", "repvgg_a0", "fastvit_t8", "repvit_m1", "repghostnet_050")
HEADER = ("network", "form", "convolutions", "MB", "ms", "ratio", "error", "FP16 error", "in FP32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One exported form of a network."""

    name: str
    model: onnx.ModelProto
    session: ort.InferenceSession
    times_ms: list[float]


def with_statistics(arch: str, images: torch.Tensor) -> nn.Module:
    """Create a network with BatchNorm statistics of the images and weights from 0.8 to 1.2."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(arch, num_classes=10).train()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            nn.init.uniform_(layer.weight, 0.8, 1.2)
            nn.init.normal_(layer.bias, 0, 0.1)
            layer.momentum = None  # average over all batches
    with torch.no_grad():
        model(images)
    return model.eval()


def fp16_error(model: onnx.ModelProto, images: NDArray[np.float32]) -> tuple[float, int]:
    """Return the relative error of the FP16 graph, and the number of its FP32 nodes."""
    batch = images[:4], images[4:]
    found = collect(model, batch)
    reduced = reduce_precision(
        model,
        "fp16",
        amax=found.amax,
        logits_NK=found.output,
        batches=lambda: iter(batch),
        run=lambda graph: run_batches(graph, batch),
    )
    return reduced.parity.relative, len(reduced.decisions)


def measure(arch: str, rounds: int, threads: int) -> bool:
    """Print both forms of a network; return whether the inference form passes its verification."""
    size = timm.get_pretrained_cfg(arch).input_size[-1]
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    model = with_statistics(arch, images)
    spec = timm_spec(model, arch)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    forms = []
    for name, network in {"trained": model, "inference": inference_form(model)}.items():
        graph = to_onnx(network, spec)
        session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        forms.append(Form(name=name, model=graph, session=session, times_ms=[]))
    one = images[:1].numpy()
    for _ in range(rounds + 1):
        for form in forms:
            start = time.perf_counter()
            form.session.run(None, {"input": one})
            form.times_ms.append(1000 * (time.perf_counter() - start))
    with torch.no_grad():
        expected = model(images).numpy()
    passed = True
    for form in forms:
        error = compare(expected, run_batches(form.model, [images.numpy()])).relative
        half, kept = fp16_error(form.model, images.numpy())
        ratios = [own / trained for own, trained in zip(form.times_ms[1:], forms[0].times_ms[1:], strict=True)]
        convolutions = Counter(node.op_type for node in form.model.graph.node)["Conv"]
        print(
            f"| {arch} | {form.name} | {convolutions} | {form.model.ByteSize() / 1e6:.1f} "
            f"| {statistics.median(form.times_ms[1:]):.2f} | {statistics.median(ratios):.2f} | {error:.1e} "
            f"| {half:.1e} | {kept} |",
            flush=True,
        )
        passed = form.name == "trained" or (error <= TOLERANCE["fp32"] and half <= TOLERANCE["fp16"])
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), help="networks, by timm's names")
    parser.add_argument("--rounds", type=int, default=50, help="timed rounds")
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime")
    arguments = parser.parse_args()
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    passed = [measure(arch, arguments.rounds, arguments.threads) for arch in arguments.nets]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
