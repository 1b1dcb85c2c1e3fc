"""The L-inf ball in whole gray levels, and `AttackTarget`, a model under attack.

Shape suffixes: N images, M selected images, H height, W width, C channels, K classes.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ConfigError, SpecError, VerificationError
from runtime.evaluate.counts import answers_of
from runtime.evaluate.models import Model

__all__ = ["AttackTarget", "bounds", "check_within", "evaluate_images", "radius_of", "rounded"]

_SLACK = 1e-6
"""Tolerance for ε such as 8/255 · 255, which is not exactly 8 in binary."""


def radius_of(epsilon: float) -> int:
    """Return the maximum change of a pixel in gray levels: ε rounded down, since images are uint8.

    Args:
        epsilon: in 1/255.

    Raises:
        ConfigError: ε is not from 1 to 255.
    """
    if not math.isfinite(epsilon) or not 1 <= epsilon + _SLACK <= 255 + 2 * _SLACK:
        hint = ""
        if 0 < epsilon < 1:
            hint = (
                f". uint8 pixels cannot change by less than 1; for {epsilon:g} of the range [0, 1], pass "
                f"{255 * epsilon:.3g}"
            )
        raise ConfigError(f"ε must be from 1 to 255, in units of 1/255, such as 4; found {epsilon:g}{hint}")
    return math.floor(epsilon + _SLACK)


def bounds(clean_NHWC: NDArray[np.uint8], radius: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the lowest and highest value of each pixel within `radius` and within 0 to 255."""
    lowest_NHWC = clean_NHWC - np.minimum(clean_NHWC, np.uint8(radius))
    highest_NHWC = clean_NHWC + np.minimum(255 - clean_NHWC, np.uint8(radius))
    return lowest_NHWC, highest_NHWC


def rounded(pixels_NHWC: NDArray[np.floating], clean_NHWC: NDArray[np.uint8], radius: int) -> NDArray[np.uint8]:
    """Return the nearest uint8 images inside the ball.

    Args:
        pixels_NHWC: attacked images, 0 to 255, not rounded.
        clean_NHWC: the images before the attack.
        radius: radius of the ball, in gray levels.
    """
    lowest_NHWC, highest_NHWC = bounds(clean_NHWC, radius)
    nearest_NHWC: NDArray[np.uint8] = np.clip(np.rint(pixels_NHWC), lowest_NHWC, highest_NHWC).astype(np.uint8)
    return nearest_NHWC


def check_within(attacked_NHWC: NDArray[np.uint8], clean_NHWC: NDArray[np.uint8], radius: int, attack: str) -> None:
    """Check that attacked images are inside the ball, before any model is evaluated on them.

    Raises:
        VerificationError: the images are not uint8 of the same shape, or differ from the clean
            images by more than `radius`.
    """
    if attacked_NHWC.dtype != np.uint8 or attacked_NHWC.shape != clean_NHWC.shape:
        raise VerificationError(
            f"the attack {attack} returned {attacked_NHWC.dtype} of shape {attacked_NHWC.shape}; expected uint8 of "
            f"shape {clean_NHWC.shape}. Nothing was measured. This is a bug in the attack: please report it"
        )
    # Subtracting the smaller from the larger value avoids unsigned wrap-around.
    change = np.maximum(attacked_NHWC, clean_NHWC) - np.minimum(attacked_NHWC, clean_NHWC)
    if change.size and change.max() > radius:
        raise VerificationError(
            f"the attack {attack} changed a pixel by {change.max()}/255; ε allows {radius}/255. Nothing was measured. "
            "This is a bug in the attack: please report it"
        )


def evaluate_images(
    model: Model, images_NHWC: NDArray[np.uint8], labels_N: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Run a model on images.

    Returns:
        Whether each image is classified correctly, (N,), by the rules of `advprop eval`: for equal
        logits, the first class wins; an infinite logit or a nan counts as wrong. And the margins,
        (N,): the logit of the true class minus the largest other logit.

    Raises:
        SpecError: the logits do not match the model's classes.
    """
    logits_NK = model.logits(images_NHWC)
    classes = len(model.spec.classes)
    if logits_NK.shape != (len(labels_N), classes) or classes < 2:
        raise SpecError(
            f"{model.name} returned outputs of shape {logits_NK.shape} for {len(labels_N)} images; expected a logit "
            f"for each of its {classes} classes, and at least two classes"
        )
    right_N = answers_of(logits_NK, labels_N).right_N
    others_NK = logits_NK.astype(np.float64)
    own_N = np.take_along_axis(others_NK, labels_N[:, None], 1)[:, 0]
    np.put_along_axis(others_NK, labels_N[:, None], -np.inf, 1)
    finite_N = np.isfinite(logits_NK).all(1)
    largest_N = np.where(finite_N, others_NK.max(1), 0.0)
    return right_N, np.where(finite_N, own_N, -np.inf) - largest_N


class AttackTarget:
    """A model under attack on a block of images. It checks and counts every query."""

    def __init__(
        self,
        model: Model,
        clean_NHWC: NDArray[np.uint8],
        labels_N: NDArray[np.int64],
        right_N: NDArray[np.bool_],
        radius: int,
        attack: str,
    ) -> None:
        """
        Args:
            model: the model to query.
            clean_NHWC: the images before the attack, uint8.
            labels_N: their classes.
            right_N: images that the model classifies correctly before the attack; the others are
                never queried.
            radius: maximum change of a pixel, in gray levels.
            attack: name of the attack, for messages.
        """
        self.clean_NHWC = clean_NHWC
        self.radius = radius
        self.not_fooled_N = right_N.copy()
        """Images that the model has classified correctly in every query so far."""
        self.queries_N = np.zeros(len(labels_N), np.int64)
        """Number of queries per image."""
        self._model, self._labels_N, self._attack = model, labels_N, attack

    @property
    def remaining(self) -> NDArray[np.int64]:
        """Indices of the images that are not yet fooled."""
        return np.flatnonzero(self.not_fooled_N)

    def query(self, images_MHWC: NDArray[np.uint8], indices_M: NDArray[np.int64]) -> NDArray[np.float64]:
        """Query the model with changed images, and record which of them fool it.

        Args:
            images_MHWC: the changed images, uint8.
            indices_M: their indices in the block.

        Returns:
            The margins, (M,).

        Raises:
            VerificationError: an image differs from the clean one by more than ε.
        """
        if not len(indices_M):
            return np.zeros(0)
        check_within(images_MHWC, self.clean_NHWC[indices_M], self.radius, self._attack)
        right_M, margin_M = evaluate_images(self._model, images_MHWC, self._labels_N[indices_M])
        self.queries_N[indices_M] += 1
        self.not_fooled_N[indices_M] &= right_M
        return margin_M
