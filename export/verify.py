"""Verify that the logits of each stage of an export agree with those of the previous stage.

Shape suffixes: N images, H height, W width, C channels, K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from export.io_forms import TOP
from export.source import Source, resized
from runtime.errors import VerificationError
from runtime.graph.model import run_batches
from runtime.loading import load
from runtime.preprocessing import Preprocessor, normalize
from runtime.session import softmax
from runtime.spec import ModelSpec
from train.models import to_channels_last

__all__ = [
    "FEW_IMAGES",
    "MIN_INT8_AGREEMENT",
    "TOLERANCE",
    "Parity",
    "agrees",
    "batches",
    "check_file",
    "check_size",
    "compare",
    "graph_logits",
    "require",
    "torch_logits",
]

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1, "int8": 1.0}
"""Largest allowed |Δlogit| of each precision, relative to the largest |logit| if that is above 1.
BF16 has three bits less than FP16. INT8 is verified by its top-1 classes only."""
MIN_INT8_AGREEMENT = 0.8
"""Minimum share of images on which an INT8 file has the top-1 class of the float32 file; below it,
something is broken."""
_MIN_AGREEMENT = 0.99

FEW_IMAGES = 2
"""Number of images for checks that hold every tensor in memory, or that confirm a result for all
images."""
_BATCH = 4
"""Batch size: small enough for a layer's output to stay in the CPU caches until the next layer
reads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How the logits of two stages compare."""

    images: int
    """Number of images."""
    max_abs: float
    """Largest |Δlogit|."""
    mean_abs: float
    """Mean |Δlogit|."""
    scale: float
    """Largest |logit| of the reference."""
    agreement: float
    """Share of images with the same top-1 class, 0 to 1. Ties within the tolerance of the logits
    count as the same."""
    kl: float
    """Mean KL divergence of the probabilities, in nats."""

    @property
    def relative(self) -> float:
        """`max_abs` relative to `scale`, if that is above 1."""
        return self.max_abs / max(1.0, self.scale)


def compare(reference_NK: NDArray[np.floating], candidate_NK: NDArray[np.floating]) -> Parity:
    """Compare logits of the same images."""
    reference, candidate = reference_NK.astype(np.float64), candidate_NK.astype(np.float64)
    difference = np.abs(candidate - reference)
    p, q = softmax(reference).astype(np.float64), softmax(candidate).astype(np.float64)
    tiny = np.finfo(np.float32).tiny
    kl = (p * (np.log(np.maximum(p, tiny)) - np.log(np.maximum(q, tiny)))).sum(1).mean()
    rows = np.arange(len(reference))
    behind = reference.max(1) - reference[rows, candidate.argmax(1)]
    same = behind <= 2 * TOLERANCE["fp32"] * max(1.0, float(np.abs(reference).max()))
    return Parity(
        images=len(reference),
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        scale=float(np.abs(reference).max()),
        agreement=float(same.mean()),
        kl=max(0.0, float(kl)),  # rounding can make it slightly negative
    )


def agrees(parity: Parity, tolerance: float, min_agreement: float = _MIN_AGREEMENT) -> bool:
    """Return whether the logits are within `tolerance` and the top-1 classes agree.

    One image may always have another class.
    """
    same_top1 = parity.agreement >= min_agreement or parity.agreement * parity.images >= parity.images - 1
    return parity.relative <= tolerance and same_top1


def require(
    parity: Parity,
    tolerance: float,
    stage: str,
    before: str,
    first: Callable[[], str] | None = None,
    *,
    min_agreement: float = _MIN_AGREEMENT,
) -> None:
    """Raise VerificationError unless `parity` is finite and within `tolerance`.

    Args:
        parity: comparison of `stage` with `before`.
        tolerance: see TOLERANCE.
        stage: name of the verified stage, for the message.
        before: name of the reference, for the message.
        min_agreement: share of images that must have the same top-1 class; one image may always
            differ.
        first: returns a sentence on the first difference between the two; called only if they
            differ.
    """
    if agrees(parity, tolerance, min_agreement):
        return
    where = f" {first()}" if first is not None else ""
    raise VerificationError(
        f"{stage} does not agree with {before} on {parity.images} images: max |Δlogit| {parity.max_abs:.3g} "
        f"at a logit scale of {parity.scale:.3g} (allowed: {tolerance:g} of it), top-1 agreement "
        f"{parity.agreement:.1%}. All files were kept.{where}"
    )


def batches(source: Source) -> Iterator[NDArray[np.float32]]:
    """Yield small batches of the source's images, normalized, float32 (N, 3, H, W)."""
    for start in range(0, len(source.images_NHWC), _BATCH):
        yield normalize(source.images_NHWC[start : start + _BATCH], source.spec.preprocessing)


@torch.inference_mode()
def torch_logits(source: Source) -> NDArray[np.float32]:
    """Return the network's logits for all images, (N, K)."""
    # oneDNN is fastest with channels_last; the weights stay the same.
    model = to_channels_last(source.model)
    return np.concatenate(
        [model(torch.from_numpy(batch).to(memory_format=torch.channels_last)).numpy() for batch in batches(source)]
    )


def graph_logits(model: onnx.ModelProto, source: Source) -> NDArray[np.float32]:
    """Return a graph's logits for all images, (N, K), computed on the CPU."""
    return run_batches(model, batches(source))


def check_size(source: Source, model: onnx.ModelProto, size: tuple[int, int]) -> None:
    """Verify a graph with open image size at another size, (height, width), on a few images.

    Raises:
        VerificationError: the graph does not agree with the network.
    """
    few = dataclasses.replace(source, images_NHWC=resized(source.images_NHWC[:FEW_IMAGES], size))
    parity = compare(torch_logits(few), graph_logits(model, few))
    require(parity, TOLERANCE["fp32"], f"model.onnx at {size[0]}x{size[1]}", "the checkpoint")


def check_file(
    path: Path, source: Source, logits_NK: NDArray[np.float32], tolerance: float = TOLERANCE["fp32"]
) -> None:
    """Load a written file, and compare its outputs with known logits of the first N images.

    Raises:
        VerificationError: the outputs differ.
    """
    with load(path, device="cpu") as session:
        spec = session.spec
        images_NHWC = source.images_NHWC[: len(logits_NK)]
        found_NK = session.run(Preprocessor.of(spec).convert(images_NHWC))
    expected_NK = _expected_output(logits_NK, spec)
    difference = float(np.abs(found_NK.astype(np.float32) - expected_NK).max())
    if not difference <= tolerance * max(1.0, float(np.abs(expected_NK).max())):
        raise VerificationError(
            f"{path} does not output the {spec.output_form} of its network: max |Δ| {difference:.3g}. "
            "All files were kept"
        )


def _expected_output(logits_NK: NDArray[np.float32], spec: ModelSpec) -> NDArray[np.float32]:
    if spec.output_form == "logits":
        return logits_NK
    probabilities_NK = softmax(logits_NK)
    return -np.sort(-probabilities_NK)[:, :TOP] if spec.output_form == "topk" else probabilities_NK
