import pytest
import torch

from train.apgd import dlr, step_size_checks


def test_step_size_is_checked_at_the_published_steps() -> None:
    # Section 3.1: shares of 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, then steps of 0.06.
    assert step_size_checks(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert step_size_checks(1) == [1]
    assert step_size_checks(10) == [3, 5, 6, 7, 8, 9, 10]


def test_dlr_loss_is_the_published_one() -> None:
    logits = torch.tensor([[5.0, 3.0, 1.0, 0.0], [5.0, 3.0, 1.0, 0.0]])
    # Correct: −(5 − 3) / (5 − 1). Wrong, label 2: −(1 − 5) / (5 − 1).
    assert dlr(logits, torch.tensor([0, 2])).tolist() == pytest.approx([-0.5, 1.0])
    assert torch.allclose(dlr(7 * logits, torch.tensor([0, 2])), dlr(logits, torch.tensor([0, 2])))
