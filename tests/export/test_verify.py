import numpy as np
import pytest

from export.verify import MIN_INT8_AGREEMENT, TOLERANCE, agrees, compare, require
from runtime.errors import VerificationError

LOGITS = np.random.default_rng(0).normal(size=(200, 10)) * 3


def test_equal_logits_agree() -> None:
    parity = compare(LOGITS, LOGITS)
    assert (parity.max_abs, parity.agreement, parity.images) == (0, 1, 200)
    assert parity.kl == pytest.approx(0, abs=1e-9)
    require(parity, TOLERANCE["fp32"], "b", "a")


def test_a_difference_is_relative_to_the_largest_logit() -> None:
    parity = compare(LOGITS * 100, LOGITS * 100 + 0.01)
    assert parity.max_abs == pytest.approx(0.01)
    assert parity.relative == pytest.approx(0.01 / np.abs(LOGITS * 100).max())
    require(parity, TOLERANCE["fp32"], "b", "a")


@pytest.mark.parametrize("damage", [np.nan, np.inf, 0.5])
def test_disagreement_is_an_error_with_figures_and_the_first_difference(damage: float) -> None:
    other = LOGITS.copy()
    other[3, 4] += damage
    message = r"b does not agree with a on 200 images: max .*top-1 agreement .*All files were kept\. It is here"
    with pytest.raises(VerificationError, match=message):
        require(compare(LOGITS, other), TOLERANCE["fp32"], "b", "a", lambda: "It is here")


def test_agreement_is_the_share_of_images_with_the_same_class() -> None:
    other = LOGITS.copy()
    other[:20] = -other[:20]
    parity = compare(LOGITS, other)
    assert parity.agreement == pytest.approx(0.9)
    assert not agrees(parity, tolerance=10)
    assert agrees(parity, tolerance=10, min_agreement=MIN_INT8_AGREEMENT)


def test_one_image_may_always_differ() -> None:
    reference = LOGITS[:10]
    for wrong, expected in ((1, True), (2, False)):
        other = reference.copy()
        other[:wrong] = -other[:wrong]
        assert agrees(compare(reference, other), tolerance=10) == expected


def test_ties_within_the_tolerance_count_as_agreement() -> None:
    tie = np.array([[1.0, 1.0, 0.0]])
    assert compare(tie, tie + np.array([[0.0, 1e-7, 0.0]])).agreement == 1
