"""Metrics against published numbers and numbers computed by hand."""

import math
from functools import partial

import numpy as np
import pytest

from runtime.errors import InputError
from runtime.evaluate.corruptions import CORRUPTIONS
from runtime.evaluate.counts import BINS, GROUPS, NANO, Counts, answers_of, count
from runtime.evaluate.intervals import jackknife, newcombe_paired, wilson, zero_variance
from runtime.evaluate.metrics import (
    ALEXNET,
    ALEXNET_CLEAN,
    calibration_error,
    corruption_errors,
    difference_interval_of,
    error_of,
    mce_alexnet,
    mean_error,
    relative_mce_alexnet,
    rms_calibration_error,
    summarize,
)

LEVELS = range(1, 6)


def counts_of(right: int, images: int) -> Counts:
    """Return counts with `right` of `images` correct, all with confidence 0.75."""
    logits = np.log(np.full((images, 2), 0.25))
    logits[:, 0] = math.log(0.75)
    labels = np.where(np.arange(images) < right, 0, 1)
    return count(answers_of(logits, labels), np.arange(images))


def test_alexnet_has_an_mce_of_100() -> None:
    own = {name: [error] * 5 for name, error in ALEXNET.items()}
    assert mce_alexnet(own) == 100.0
    assert relative_mce_alexnet(own, ALEXNET_CLEAN) == pytest.approx(100.0, abs=1e-12)
    assert mce_alexnet(dict(reversed(own.items()))) == 100.0  # by name, not by order
    assert set(ALEXNET) == set(CORRUPTIONS)
    assert mean_error(own) == pytest.approx(11.834896 / 15)  # the sum of the table, added by hand; it is no mCE


def test_mce_of_made_up_errors_by_hand() -> None:
    """Half of AlexNet's errors, except fog with 0.1, 0.2, 0.3, 0.4, 0.5, whose mean is 0.3."""
    errors = {name: [error / 2] * 5 for name, error in ALEXNET.items()} | {"fog": [0.1, 0.2, 0.3, 0.4, 0.5]}
    assert mce_alexnet(errors) == pytest.approx((14 * 50 + 100 * 0.3 / 0.819324) / 15)
    assert mce_alexnet(errors) == pytest.approx(49.107704, abs=1e-6)
    # Above a clean error of 0.2, fog adds 0.1 and brightness 0.082296; to AlexNet's, 0.384324 and
    # 0.129592.
    clean = [100 * (ALEXNET[name] / 2 - 0.2) / (ALEXNET[name] - 0.435) for name in ALEXNET if name != "fog"]
    assert clean[9] == pytest.approx(100 * 0.082296 / 0.129592)
    assert relative_mce_alexnet(errors, 0.2) == pytest.approx((sum(clean) + 100 * 0.1 / 0.384324) / 15)
    assert mean_error({"fog": [0.1, 0.2, 0.3, 0.4, 0.5], "snow": [0.5] * 5}) == pytest.approx(0.4)


def test_mce_needs_exactly_the_fifteen_corruptions() -> None:
    whole = {name: [0.5] * 5 for name in CORRUPTIONS}
    with pytest.raises(InputError, match="found no errors or another number for fog"):
        mce_alexnet({name: levels for name, levels in whole.items() if name != "fog"})
    with pytest.raises(InputError, match="found no errors or another number for snow"):
        mce_alexnet(whole | {"snow": [0.5] * 4})
    with pytest.raises(InputError, match="found spatter"):
        mce_alexnet(whole | {"spatter": [0.5] * 5})
    with pytest.raises(InputError, match="needs a corruption with all five severities"):
        mean_error({})


def test_intervals_equal_published_ones() -> None:
    # Examples of two papers by Newcombe (1998): 81 of 263, and the pairs 36, 12, 2, 0.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert newcombe_paired(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=5e-5)
    assert wilson(0, 0) is None
    assert newcombe_paired(0, 0, 0, 0) is None
    lower, upper = newcombe_paired(100, 0, 0, 0)  # type: ignore[misc]
    assert lower < 0 < upper
    assert newcombe_paired(700, 5, 60, 235)[1] < 0  # type: ignore[index]  # a clear loss excludes 0


def test_jackknife_of_a_mean_equals_students_interval() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    lower, upper = jackknife(lambda groups: sum(values[group] for group in groups) / len(groups), 4)  # type: ignore[misc]
    half = 3.182 * math.sqrt(sum((value - 4) ** 2 for value in values) / 3 / 4)
    assert (lower, upper) == pytest.approx((4 - half, 4 + half))
    assert jackknife(lambda groups: 1.0, 1) is None


def test_jackknife_covers_the_mean_error_of_repeated_images() -> None:
    """Five cells have the same 400 images, hard or easy in all of them: 100 intervals of 95%."""
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        hard = random.random(400) < 0.3
        cells = {}
        for severity in range(1, 6):
            wrong = random.random(400) < np.where(hard, 0.9, 0.1)
            logits = np.stack([np.where(wrong, 0.0, 1.0), np.where(wrong, 1.0, 0.0)], 1)
            cells[f"fog/{severity}"] = count(answers_of(logits, np.zeros(400, int)), np.arange(400))
        lower, upper = summarize(cells)["mean_error"]["interval"]
        covered += lower <= 0.3 * 0.9 + 0.7 * 0.1 <= upper
    assert 0.9 <= covered / 100 <= 0.99


def test_the_interval_has_a_width_if_all_images_are_alike() -> None:
    assert zero_variance(0.0, 100, -1.0, 1.0) == pytest.approx((-0.0370, 0.0370), abs=5e-5)  # 1.96²/(100 + 1.96²)
    assert zero_variance(1.0, 100, 0.0, 1.0) == pytest.approx((0.9630, 1.0), abs=5e-5)
    cells = {
        f"{name}/{level}": paired(np.ones(100, bool), np.ones(100, bool)) for name in CORRUPTIONS for level in LEVELS
    }
    cells["clean"] = paired(np.ones(100, bool), np.ones(100, bool))
    metrics = summarize(cells)
    assert metrics["mean_error"]["interval"] == pytest.approx((0.0, 0.0370), abs=5e-5)
    # 76 answers of each of 100 images are equal: 1.96²/(7600 + 1.96²), with the clean ones.
    assert metrics["mean_error"]["difference_interval"] == pytest.approx((-0.000505, 0.000505), abs=1e-6)
    most = mce_alexnet(dict.fromkeys(CORRUPTIONS, [1.0] * 5))
    assert metrics["mce_alexnet"]["interval"] == pytest.approx((0.0, 0.0370 * most), abs=0.01)
    low, high = metrics["relative_mce_alexnet"]["difference_interval"]
    assert -low == high > 0.0370 * most


def test_groups_that_are_alike_by_chance_have_no_interval() -> None:
    """One of five images in each group is wrong: no variance, but no certainty either."""
    right = np.arange(100) // 20 != 2
    cells = {f"fog/{level}": paired(right, np.ones(100, bool)) for level in LEVELS}
    mean = summarize(cells)["mean_error"]
    assert mean["value"] == pytest.approx(0.2)
    assert mean["interval"] is None
    assert mean["difference_interval"] is None


@pytest.mark.parametrize("share", [0.001, 0.004, 0.01, 0.03])
def test_the_interval_of_a_rare_difference_covers_it(share: float) -> None:
    """One of two models misclassifies some, or none, of 300 images: 300 intervals of 95%."""
    random = np.random.default_rng(7)
    covered, no_loss = 0, 0
    for _ in range(300):
        lost = random.random(300) < share
        cell = paired(~lost, np.ones(300, bool))
        interval = difference_interval_of([cell], partial(error_of, cell))
        assert interval
        low, high = interval
        assert low < high
        covered += low <= share <= high
        no_loss += not lost.any()
    assert covered / 300 >= 0.9
    assert no_loss or share > 0.01


def paired(right: np.ndarray, reference_right: np.ndarray) -> Counts:
    """Return counts of a model with two classes, compared with a reference."""
    labels = np.zeros(len(right), int)
    answers = [answers_of(np.stack([own, ~own], 1).astype(float), labels) for own in (right, reference_right)]
    return count(answers[0], np.arange(len(right)), answers[1])


def test_calibration_errors_by_hand() -> None:
    # Confidences 0.75 (bin 12 of 15), right in 3 of 6; and 0.9, right in 4 of 4.
    first = counts_of(3, 6)
    logits = np.log(np.tile([0.9, 0.1], (4, 1)))
    both = first + count(answers_of(logits, np.zeros(4, int)), np.arange(4))
    assert both.bin_images[11] == 6
    assert both.bin_confidence_nano[11] == 6 * 750_000_000
    assert both.bin_images[13] == 4
    assert calibration_error(both) == pytest.approx(0.6 * 0.25 + 0.4 * 0.1)
    assert rms_calibration_error(both) == pytest.approx(math.sqrt(0.6 * 0.25**2 + 0.4 * 0.1**2))


def test_ties_rank_as_in_argmax_and_outputs_that_are_not_finite_are_wrong() -> None:
    logits = np.array([[1, 1, 0], [1, 1, 0], [np.nan, 5, 0], [np.inf, 0, 0], [0, 2, 3]], np.float32)
    answers = answers_of(logits, np.array([0, 1, 1, 0, 1]))
    assert answers.classes_N.tolist() == [0, 0, -1, -1, 2]
    assert answers.right_N.tolist() == [True, False, False, False, False]
    counts = count(answers, np.arange(5))
    assert (counts.images, counts.top1, counts.top5, counts.not_finite) == (5, 1, 3, 2)
    assert counts.bin_images[0] == 2  # the two that are not finite have confidence 0


def test_top5_counts_the_first_five() -> None:
    logits = -np.arange(8.0)[None].repeat(8, 0)
    answers = answers_of(logits, np.arange(8))
    assert answers.top5_N.tolist() == [True] * 5 + [False] * 3


def test_only_the_selected_classes_compete() -> None:
    logits = np.array([[9.0, 1.0, 2.0, 3.0], [9.0, 4.0, 2.0, 3.0]])
    answers = answers_of(logits, np.array([3, 3]), classes=(1, 3))
    assert answers.classes_N.tolist() == [3, 1]
    assert answers.right_N.tolist() == [True, False]
    odds = np.exp([1.0, 3.0])
    assert answers.confidence_nano_N[0] == round(NANO * odds[1] / odds.sum())


def test_comparison_with_a_reference() -> None:
    model = answers_of(np.eye(3)[[0, 1, 2, 2]], np.array([0, 1, 0, 1]))
    reference = answers_of(np.eye(3)[[0, 2, 2, 1]], np.array([0, 1, 0, 1]))
    counts = count(model, np.arange(4), reference)
    pairs = counts.pairs
    assert pairs is not None
    assert (pairs.agree, pairs.both, pairs.only_model, pairs.only_reference) == (2, 1, 1, 1)
    assert pairs.reference_group_right[:4] == (1, 0, 0, 1)
    double = counts + counts
    assert double.pairs is not None and double.pairs.agree == 4
    assert Counts.none(reference=True) + counts == counts
    with pytest.raises(InputError, match="without one"):
        counts + Counts.none()


def test_counts_of_parts_add_up_to_the_whole() -> None:
    random = np.random.default_rng(1)
    logits, labels = random.normal(size=(200, 7)) * 3, random.integers(0, 7, 200)
    answers, positions = answers_of(logits, labels), np.arange(200)
    whole = count(answers, positions)
    total = Counts.none()
    for part in np.array_split(random.permutation(200), 9):
        total = total + count(answers_of(logits[part], labels[part]), positions[part])
    assert total == whole
    assert Counts.from_dict(whole.to_dict()) == whole
    assert sum(whole.bin_images) == sum(whole.group_images) == 200
    assert (len(whole.bin_images), len(whole.group_images)) == (BINS, GROUPS)
    with pytest.raises(InputError, match="expected counts"):
        Counts.from_dict({"images": 3})


def test_metrics_say_why_there_is_no_mce() -> None:
    grid = {f"{name}/{severity}": counts_of(30, 40) for name in CORRUPTIONS for severity in range(1, 6)}
    metrics = summarize(grid)
    assert metrics["mean_error"]["value"] == 0.25
    assert metrics["mce_alexnet"]["value"] == pytest.approx(100 * np.mean([0.25 / error for error in ALEXNET.values()]))
    assert "AlexNet is 100" in metrics["mce_alexnet"]["unit"]
    assert "not to be compared with mce_alexnet" in metrics["mean_error"]["unit"]
    assert "--clean" in metrics["relative_mce_alexnet"]["why_not"]
    assert summarize(grid, why_no_mce="CIFAR")["mce_alexnet"] == {"value": None, "why_not": "CIFAR"}
    some = summarize({f"fog/{severity}": counts_of(30, 40) for severity in range(1, 6)})
    assert some["mean_error"]["corruptions"] == ["fog"]
    assert some["mce_alexnet"]["why_not"].startswith("1 of the fifteen")
    assert summarize({"fog/1": counts_of(1, 4)})["mean_error"]["value"] is None
    assert corruption_errors(grid | {"spatter/1": counts_of(1, 4)}).keys() == set(CORRUPTIONS)
    with_clean = summarize(grid | {"clean": counts_of(36, 40)})
    expected = [(0.25 - 0.1) / (error - 0.435) for error in ALEXNET.values()]
    assert with_clean["relative_mce_alexnet"]["value"] == pytest.approx(100 * np.mean(expected))


def test_identical_answers_never_have_a_wider_interval_than_different_ones() -> None:
    """A float16 file that answers alike, and an INT8 file that differs in two answers of 24 images."""
    reference = np.arange(24) % 3 > 0
    same = {f"{name}/{level}": paired(reference, reference) for name in CORRUPTIONS for level in LEVELS}
    lost = reference.copy()
    lost[[1, 2]] = False
    widths = []
    for cells in (same, same | {"fog/3": paired(lost, reference)}):
        mean = summarize(cells)["mean_error"]
        low, high = mean["difference_interval"]
        assert low <= mean["difference"] <= high
        widths.append(high - low)
    assert 0 < widths[0] <= widths[1]
    assert widths[0] == pytest.approx(2 * 0.00213, abs=1e-4)  # 1.96²/(24 · 75 + 1.96²)


def test_mce_relative_to_the_reference() -> None:
    right, better = np.arange(200) % 2 == 0, np.arange(200) % 4 < 3
    cells = {f"{name}/{level}": paired(better, right) for name in ("fog", "snow") for level in LEVELS}
    mce = summarize(cells, why_no_mce="other classes")["mce_reference"]
    assert mce["value"] == pytest.approx(50.0)  # an error of 25% instead of 50%
    assert mce["difference"] == pytest.approx(-50.0)
    assert mce["corruptions"] == ["snow", "fog"]
    assert "reference is 100" in mce["unit"]
    low, high = mce["interval"]
    assert low <= 50.0 <= high < 100
    assert mce["difference_interval"] == pytest.approx([low - 100, high - 100])
    perfect = {f"fog/{level}": paired(right, np.ones(200, bool)) for level in LEVELS}
    assert "no error under fog" in summarize(perfect)["mce_reference"]["why_not"]
    assert "mce_reference" not in summarize({f"fog/{level}": counts_of(30, 40) for level in LEVELS})
