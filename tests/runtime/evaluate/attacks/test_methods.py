"""Square attack and noise: the published schedule, the ball, queries, and ART's attack."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import ConfigError, VerificationError
from runtime.evaluate.attacks.methods import noise, square, square_share
from runtime.evaluate.attacks.target import AttackTarget, bounds, check_within, radius_of, rounded
from runtime.evaluate.models import Model, load_model
from tests.support.attack_sets import generators_of, held_digits, recording, target_of, with_logits
from tests.support.evaluation_sets import spec_of, toy
from tests.support.report_sets import digit_folder, digit_net, quantized


def check_share(share: float) -> None:
    assert 0 < share <= 1


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """Return a network in FP32, and in INT8 as calibrated by advprop."""
    folder = tmp_path_factory.mktemp("digits")
    plain = digit_net(folder / "net.onnx")
    int8 = quantized(plain, digit_folder(folder / "calibration", range(48)), folder / "net.int8.onnx")
    return load_model(plain, device="cpu", threads=1), load_model(int8, device="cpu", threads=1)


PUBLISHED = {  # squares tried, of 10,000 → divisor of the initial share
    **dict.fromkeys((0, 1, 10), 1),
    **dict.fromkeys((11, 50), 2),
    **dict.fromkeys((51, 200), 4),
    **dict.fromkeys((201, 500), 8),
    **dict.fromkeys((501, 1000), 16),
    **dict.fromkeys((1001, 2000), 32),
    **dict.fromkeys((2001, 4000), 64),
    **dict.fromkeys((4001, 6000), 128),
    **dict.fromkeys((6001, 8000), 256),
    **dict.fromkeys((8001, 9999), 512),
}


def test_the_schedule_equals_the_published_one() -> None:
    for query, divisor in PUBLISHED.items():
        assert square_share(query, 10_000, 0.8) == 0.8 / divisor
    # With a tenth of the budget, each step comes ten times earlier: `int(it / n_iters * 10000)`.
    assert [square_share(query, 1000, 0.8) for query in (1, 2, 5, 6, 21, 801)] == [
        0.8 / d for d in (1, 2, 2, 4, 8, 512)
    ]
    assert [square_share(query, 5, 0.3) for query in range(5)] == [0.3 / d for d in (1, 32, 64, 128, 256)]


@given(st.integers(0, 2**32 - 1), st.integers(1, 255), st.sampled_from(["square", "noise"]))
def test_no_query_leaves_the_ball(seed: int, radius: int, attack: str) -> None:
    random = np.random.default_rng(seed)
    # Half of the values are at an end of the range: changes must be clipped and not wrap.
    clean = random.choice(np.asarray([0, 0, 1, 128, 254, 255, 255], np.uint8), (3, 5, 6, 3))
    seen: list[np.ndarray] = []
    labels = np.asarray([0, 1, 2])
    fixed = with_logits(toy(spec=spec_of()), lambda images: np.eye(3)[labels[: len(images)]])
    target = target_of(recording(fixed, seen), clean, labels, radius)
    if attack == "square":
        square(target, generators_of(3, seed), queries=8, progress=check_share)
    else:
        noise(target, generators_of(3, seed), draws=8, progress=check_share)
    assert len(seen) == 8
    for queried in seen:
        assert queried.dtype == np.uint8
        change = queried.astype(int) - clean
        assert np.abs(change).max() <= radius
        # Every value changes by the maximum: to ±ε or the end of the range.
        assert np.all((np.abs(change) == radius) | (queried == 0) | (queried == 255))
    assert len({queried.tobytes() for queried in seen}) > 1


@given(st.integers(0, 2**32 - 1), st.floats(1, 20))
def test_rounding_stays_in_the_ball_if_epsilon_is_fractional(seed: int, epsilon: float) -> None:
    random = np.random.default_rng(seed)
    clean = random.choice(np.asarray([0, 3, 128, 252, 255], np.uint8), (2, 4, 4, 3))
    pixels = np.clip(clean + random.uniform(-epsilon, epsilon, clean.shape), 0, 255)
    found = rounded(pixels, clean, radius_of(epsilon))
    check_within(found, clean, radius_of(epsilon), "rounding")
    assert np.abs(found.astype(int) - clean).max() <= epsilon + 1e-6
    assert np.abs(found - pixels).max() <= 1
    lowest, highest = bounds(clean, radius_of(epsilon))
    assert np.all((lowest <= clean) & (clean <= highest))


def test_epsilon_is_in_gray_levels() -> None:
    assert [radius_of(epsilon) for epsilon in (1, 1.9, 2.5, 255 * (8 / 255), 255)] == [1, 1, 2, 8, 255]
    for epsilon in (0, -1, 256, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="from 1 to 255"):
            radius_of(epsilon)
    with pytest.raises(ConfigError, match=r"found 0.0157.* for 0.0157 of the range \[0, 1\], pass 4"):
        radius_of(0.0157)


def test_images_outside_the_ball_are_refused() -> None:
    clean = np.full((1, 2, 2, 3), 250, np.uint8)
    with pytest.raises(VerificationError, match="changed a pixel by 5/255; ε allows 4/255"):
        check_within(clean + np.uint8(5), clean, 4, "square")
    with pytest.raises(VerificationError, match="by 6/255"):  # 244 differs by 6, and must not wrap
        check_within(clean - np.uint8(6), clean, 4, "square")
    with pytest.raises(VerificationError, match="float64"):
        check_within(clean.astype(float), clean, 4, "square")


def test_queries_are_counted_and_fooled_images_are_not_queried_again() -> None:
    """The model misclassifies image 1 at its third query, and never the others."""
    clean = np.stack([np.full((6, 6, 3), level, np.uint8) for level in (50, 100, 150)])
    labels = np.zeros(3, np.int64)
    queried_by_image = np.zeros(3, int)

    def logits(images: np.ndarray) -> np.ndarray:
        answers = np.tile([1.0, 0.0, 0.0], (len(images), 1))
        for place, image in enumerate(images):
            which = int(np.abs(np.asarray([50, 100, 150]) - image.mean()).argmin())
            queried_by_image[which] += 1
            if which == 1 and queried_by_image[1] == 3:
                answers[place] = [0.0, 1.0, 0.0]
        return answers

    model = with_logits(toy(spec=spec_of()), logits)
    target = target_of(model, clean, labels, 4)
    square(target, generators_of(3), queries=20, progress=check_share)
    assert target.queries_N.tolist() == queried_by_image.tolist() == [20, 3, 20]
    assert target.not_fooled_N.tolist() == [True, False, True]
    partial = AttackTarget(model, clean, labels, np.asarray([True, False, True]), 4, "square")
    square(partial, generators_of(3), queries=1, progress=check_share)
    assert partial.queries_N.tolist() == [1, 0, 1]


def test_outputs_that_are_not_finite_count_as_wrong() -> None:
    clean, labels = np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.int64)
    model = with_logits(toy(spec=spec_of()), lambda images: np.full((len(images), 3), np.nan))
    target = target_of(model, clean, labels, 4)
    noise(target, generators_of(2), draws=5, progress=check_share)
    assert not target.not_fooled_N.any()
    assert target.queries_N.tolist() == [1, 1]


def test_square_attack_fools_more_images_than_noise(digits: tuple[Model, Model]) -> None:
    for model in digits:
        images, labels = held_digits(model, 60)
        left = {}
        for name in ("square", "noise"):
            target = target_of(model, images, labels, 16)
            if name == "square":
                square(target, generators_of(60), queries=150, progress=check_share)
            else:
                noise(target, generators_of(60), draws=150, progress=check_share)
            left[name] = target.not_fooled_N.mean()
        assert left["square"] < left["noise"] - 0.3, left


def test_the_outcome_of_an_image_does_not_depend_on_its_batch(digits: tuple[Model, Model]) -> None:
    model, _ = digits
    images, labels = held_digits(model, 12)

    def attacked(order: list[int]) -> dict[int, tuple[bool, int]]:
        target = target_of(model, images[order], labels[order], 24)
        generators = generators_of(12)
        square(target, [generators[place] for place in order], queries=40, progress=check_share)
        return {
            place: (bool(not_fooled), int(queries))
            for place, not_fooled, queries in zip(order, target.not_fooled_N, target.queries_N, strict=True)
        }

    together = attacked(list(range(12)))
    assert attacked([11, 3, 7]) == {place: together[place] for place in (11, 3, 7)}
    assert attacked(list(range(11, -1, -1))) == together


@pytest.mark.parametrize("which", [0, 1], ids=["fp32", "int8"])
def test_accuracy_is_within_three_points_of_arts_square_attack(digits: tuple[Model, Model], which: int) -> None:
    pytest.importorskip("art", reason="needs adversarial-robustness-toolbox")
    from art.attacks.evasion import SquareAttack
    from art.estimators.classification.blackbox import BlackBoxClassifierNeuralNetwork

    model = digits[which]
    images, labels = held_digits(model, 200)
    radius, queries = 16, 100

    def predict(pixels: np.ndarray) -> np.ndarray:
        # ART queries whole gray levels too, because the images and ε are.
        return model.logits(np.rint(pixels * 255).astype(np.uint8))

    classifier = BlackBoxClassifierNeuralNetwork(
        predict, images.shape[1:], 10, channels_first=False, clip_values=(0.0, 1.0)
    )
    attack = SquareAttack(classifier, max_iter=queries - 1, eps=radius / 255, p_init=0.8, verbose=False)
    ours, theirs = [], []
    for seed in range(3):
        target = target_of(model, images, labels, radius)
        square(target, generators_of(len(labels), seed), queries=queries, progress=check_share)
        ours.append(target.not_fooled_N.mean())
        np.random.seed(seed)
        attacked = attack.generate(images.astype(np.float32) / 255, labels)
        theirs.append((predict(attacked).argmax(1) == labels).mean())
    assert 0.4 < np.mean(theirs) < 0.7
    assert abs(np.mean(ours) - np.mean(theirs)) < 0.03, (ours, theirs)
