"""Parity on real images: each stage's logits against those of the stage before.

Shape suffixes: N images, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import VerificationError
from runtime.session import softmax

__all__ = ["LEAST_INT8_AGREEMENT", "TOLERANCE", "Parity", "agrees", "compare", "require"]

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1, "int8": 1.0}
"""Largest |Δlogit| of each precision, as a share of the largest |logit| where that is above 1.
BF16 has three bits less than FP16; INT8 is judged by its top-1."""
LEAST_INT8_AGREEMENT = 0.8
"""Least share of images on which an INT8 file has the float32 one's top-1 class: below it, something is broken."""
_LEAST_AGREEMENT = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How two stages' logits compare."""

    images: int
    """Images compared."""
    max_abs: float
    """Largest |Δlogit|."""
    mean_abs: float
    """Mean |Δlogit|."""
    scale: float
    """Largest |logit| of the reference."""
    agreement: float
    """Share of images with the same top-1 class, in [0, 1]; ties within the tolerance of
    the logits do not count against it."""
    kl: float
    """Mean KL divergence of the probabilities, nats."""

    @property
    def relative(self) -> float:
        """`max_abs` as a share of `scale` where that is above 1."""
        return self.max_abs / max(1.0, self.scale)


def compare(reference_NK: NDArray[np.floating], candidate_NK: NDArray[np.floating]) -> Parity:
    """Compares logits of the same images."""
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
        kl=max(0.0, float(kl)),  # rounding may take it just below
    )


def agrees(parity: Parity, tolerance: float, least_agreement: float = _LEAST_AGREEMENT) -> bool:
    """Tells whether `parity` is within `tolerance`: its logits, and its top-1 but for one image."""
    same_top1 = parity.agreement >= least_agreement or parity.agreement * parity.images >= parity.images - 1
    return parity.relative <= tolerance and same_top1


def require(
    parity: Parity,
    tolerance: float,
    stage: str,
    before: str,
    first: Callable[[], str] | None = None,
    *,
    least_agreement: float = _LEAST_AGREEMENT,
) -> None:
    """Raises VerificationError where `parity` is outside `tolerance`, or not finite.

    Args:
        parity: of `stage` against `before`.
        tolerance: see TOLERANCE.
        stage: what was verified, for the message.
        before: what it was verified against.
        least_agreement: share of images that must keep their top-1 class; one miss is always allowed.
        first: finds where the two part, in words; called only where they do.
    """
    if agrees(parity, tolerance, least_agreement):
        return
    where = f" {first()}" if first is not None else ""
    raise VerificationError(
        f"{stage} does not agree with {before} on {parity.images} images: max |Δlogit| {parity.max_abs:.3g} "
        f"at a logit scale of {parity.scale:.3g} (allowed {tolerance:g} of it), top-1 agreement "
        f"{parity.agreement:.1%}. All files were kept.{where}"
    )
