"""Whether a stage is what the stage before it was: run on real images, and where not, which layer.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from export.bisect import module_errors
from export.io_forms import TOP
from export.source import Source, resized
from export.to_onnx import INPUT, OUTPUT
from export.verify import TOLERANCE, compare, require
from runtime.errors import VerificationError
from runtime.graph.compare import TensorError, first_beyond, graph_errors
from runtime.graph.model import open_session
from runtime.graph.rounding import rounded_name
from runtime.loading import load
from runtime.preprocessing import network_input, normalize
from runtime.session import softmax
from runtime.spec import ModelSpec

__all__ = [
    "batches",
    "check_file",
    "check_size",
    "first_module",
    "first_tensor",
    "graph_logits",
    "torch_logits",
]

_BATCH = 4
"""Images at once: few enough that a layer's output is still in the caches when the next layer reads it."""
_FEW = 2
"""Images on which every tensor is compared, all of them held in memory, or another size confirmed."""


def batches(source: Source) -> Iterator[NDArray[np.float32]]:
    """Normalized images, float32 (N, 3, H, W), a few at a time."""
    for start in range(0, len(source.images_NHWC), _BATCH):
        yield normalize(source.images_NHWC[start : start + _BATCH], source.spec.preprocessing)


@torch.inference_mode()
def torch_logits(source: Source) -> NDArray[np.float32]:
    """The network's own answers to all images, (N, K)."""
    # What oneDNN likes best; the weights are the same.
    model = source.model.to(memory_format=torch.channels_last)
    return np.concatenate(
        [model(torch.from_numpy(batch).to(memory_format=torch.channels_last)).numpy() for batch in batches(source)]
    )


def graph_logits(model: onnx.ModelProto, source: Source) -> NDArray[np.float32]:
    """A graph's answers to all images, (N, K), on the CPU."""
    session = open_session(model)
    return np.concatenate([session.run([OUTPUT], {INPUT: batch})[0] for batch in batches(source)])


def first_module(source: Source, model: onnx.ModelProto) -> Callable[[], str]:
    """Returns what finds the first module whose output the graph does not have."""

    def find() -> str:
        batch = next(batches(source))[:_FEW]
        return _in_words(
            first_beyond(module_errors(source.model, model, source.spec, batch), TOLERANCE["fp32"]), "layer"
        )

    return find


def first_tensor(
    source: Source, model: onnx.ModelProto, rounded: onnx.ModelProto, tolerance: float
) -> Callable[[], str]:
    """Returns what finds the first tensor that is not the same in both graphs."""

    def find() -> str:
        batch = next(batches(source))[:_FEW]
        return _in_words(first_beyond(graph_errors(model, rounded, batch, rounded_name), tolerance), "node")

    return find


def _in_words(entry: TensorError | None, kind: str) -> str:
    if entry is None:
        return f"No single {kind} is beyond that on {_FEW} images: small errors add up"
    how = f"off by {entry.error:.2g} of its largest value" if np.isfinite(entry.error) else "not finite"
    return f"The first {kind} that diverges is {entry.node} ({entry.op}), {how}"


def check_size(source: Source, model: onnx.ModelProto, size: tuple[int, int]) -> None:
    """Verifies a graph of open image size at another one, on a few images."""
    few = dataclasses.replace(source, images_NHWC=resized(source.images_NHWC[:_FEW], size))
    parity = compare(torch_logits(few), graph_logits(model, few))
    require(parity, TOLERANCE["fp32"], f"model.onnx at {size[0]}x{size[1]}", "the checkpoint")


def check_file(
    path: Path, source: Source, logits_NK: NDArray[np.float32], tolerance: float = TOLERANCE["fp32"]
) -> None:
    """Runs the file that was written, as a user would, against its network's logits of the first N images."""
    with load(path, device="cpu") as session:
        spec = session.spec
        images_NHWC = source.images_NHWC[: len(logits_NK)]
        answers_NK = session.run(network_input(images_NHWC, spec.preprocessing, spec.input_form))
    expected_NK = _expected(logits_NK, spec)
    difference = float(np.abs(answers_NK.astype(np.float32) - expected_NK).max())
    if not difference <= tolerance * max(1.0, float(np.abs(expected_NK).max())):
        raise VerificationError(
            f"{path} gives other {spec.output_form} than its network: max |Δ| {difference:.3g}. All files were kept"
        )


def _expected(logits_NK: NDArray[np.float32], spec: ModelSpec) -> NDArray[np.float32]:
    if spec.output_form == "logits":
        return logits_NK
    probabilities_NK = softmax(logits_NK)
    return -np.sort(-probabilities_NK)[:, :TOP] if spec.output_form == "topk" else probabilities_NK
