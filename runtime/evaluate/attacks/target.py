"""`Victim`: a model under attack. It checks what it is shown, counts every question, and knows who still stands.

Shape suffixes: N images, M of them, H height, W width, C channels, K classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.errors import SpecError
from runtime.evaluate.attacks.ball import check_within
from runtime.evaluate.counts import answers_of
from runtime.evaluate.models import Model

__all__ = ["Victim", "judge"]


def judge(
    model: Model, images_NHWC: NDArray[np.uint8], labels_N: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Asks a model.

    Returns:
        Which images it gets right, as `advprop eval` counts: of equal logits the first class wins, and an infinite
        logit or a nan is wrong. And the margins: the true class's logit less the largest other one.

    Raises:
        SpecError: the logits do not go with the model's classes.
    """
    logits_NK = model.logits(images_NHWC)
    classes = len(model.spec.classes)
    if logits_NK.shape != (len(labels_N), classes) or classes < 2:
        raise SpecError(
            f"{model.name} gave outputs of shape {logits_NK.shape} for {len(labels_N)} images; expected a logit for "
            f"each of its {classes} classes, and two classes at least"
        )
    right_N = answers_of(logits_NK, labels_N).right_N
    others_NK = logits_NK.astype(np.float64)
    own_N = np.take_along_axis(others_NK, labels_N[:, None], 1)[:, 0]
    np.put_along_axis(others_NK, labels_N[:, None], -np.inf, 1)
    finite_N = np.isfinite(logits_NK).all(1)
    largest_N = np.where(finite_N, others_NK.max(1), 0.0)
    return right_N, np.where(finite_N, own_N, -np.inf) - largest_N


class Victim:
    """A model, and a block of images that it is to be fooled on."""

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
            model: who is asked.
            clean_NHWC: the images, uint8.
            labels_N: their classes.
            right_N: which of them the model gets right as they are; the others are never asked about.
            radius: largest change of a pixel, in gray levels.
            attack: its name, for messages.
        """
        self.clean_NHWC = clean_NHWC
        self.radius = radius
        self.standing_N = right_N.copy()
        """Which images the model has always got right so far."""
        self.queries_N = np.zeros(len(labels_N), np.int64)
        """How often it was asked about each."""
        self._model, self._labels_N, self._attack = model, labels_N, attack

    @property
    def rows(self) -> NDArray[np.int64]:
        """The places of the images that still stand."""
        return np.flatnonzero(self.standing_N)

    def ask(self, images_MHWC: NDArray[np.uint8], rows_M: NDArray[np.int64]) -> NDArray[np.float64]:
        """Shows the model changed images; those that fool it stand no more.

        Args:
            images_MHWC: uint8.
            rows_M: which images these are.

        Returns:
            The margins, (M,).

        Raises:
            VerificationError: an image is farther than ε from the clean one.
        """
        if not len(rows_M):
            return np.zeros(0)
        check_within(images_MHWC, self.clean_NHWC[rows_M], self.radius, self._attack)
        right_M, margin_M = judge(self._model, images_MHWC, self._labels_N[rows_M])
        self.queries_N[rows_M] += 1
        self.standing_N[rows_M] &= right_M
        return margin_M
