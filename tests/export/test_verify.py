import numpy as np
import pytest

from export.verify import TOLERANCE, compare, require
from runtime.errors import VerificationError

LOGITS = np.random.default_rng(0).normal(size=(200, 10)) * 3


def test_equal_logits_agree() -> None:
    parity = compare(LOGITS, LOGITS)
    assert (parity.max_abs, parity.agreement, parity.images) == (0, 1, 200)
    assert parity.kl == pytest.approx(0, abs=1e-9)
    require(parity, TOLERANCE["fp32"], "b", "a")


def test_a_small_difference_is_measured_relative_to_the_logits() -> None:
    parity = compare(LOGITS * 100, LOGITS * 100 + 0.01)
    assert parity.max_abs == pytest.approx(0.01)
    assert parity.relative == pytest.approx(0.01 / np.abs(LOGITS * 100).max())
    require(parity, TOLERANCE["fp32"], "b", "a")


@pytest.mark.parametrize("damage", [np.nan, np.inf, 0.5])
def test_disagreement_is_an_error_with_its_figures(damage: float) -> None:
    other = LOGITS.copy()
    other[3, 4] += damage
    with pytest.raises(VerificationError, match=r"b does not agree with a on 200 images: max .*top-1 agreement"):
        require(compare(LOGITS, other), TOLERANCE["fp32"], "b", "a")


def test_agreement_counts_images_whose_answer_changed() -> None:
    other = LOGITS.copy()
    other[:20] = -other[:20]
    assert compare(LOGITS, other).agreement == pytest.approx(0.9)


def test_a_tie_does_not_count_against_agreement() -> None:
    tie = np.array([[1.0, 1.0, 0.0]])
    assert compare(tie, tie + np.array([[0.0, 1e-7, 0.0]])).agreement == 1
