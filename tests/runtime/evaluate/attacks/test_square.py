"""Square attack and the noise control: the published schedule, bounds, counts, and ART's on the same INT8 file."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import ConfigError, VerificationError
from runtime.evaluate.attacks.ball import bounds, check_within, radius_of, rounded
from runtime.evaluate.attacks.noise import noise
from runtime.evaluate.attacks.square import share_at, square
from runtime.evaluate.attacks.target import Victim
from runtime.evaluate.models import Model, load_model
from tests.support.attack_sets import draws_of, held_digits, recording, victim_of, with_logits
from tests.support.evaluation_sets import spec_of, toy
from tests.support.report_sets import digit_folder, digit_net, quantized


def no_tick(share: float) -> None:
    assert 0 < share <= 1


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """A network in FP32, and in INT8 as our calibration makes it."""
    folder = tmp_path_factory.mktemp("digits")
    plain = digit_net(folder / "net.onnx")
    int8 = quantized(plain, digit_folder(folder / "calibration", range(48)), folder / "net.int8.onnx")
    return load_model(plain, device="cpu", threads=1), load_model(int8, device="cpu", threads=1)


PUBLISHED = {  # squares tried, of 10,000 → the share of the first squares is divided by
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


def test_the_schedule_is_the_published_one() -> None:
    for query, divisor in PUBLISHED.items():
        assert share_at(query, 10_000, 0.8) == 0.8 / divisor
    # With a tenth of the budget everything comes ten times as soon: `int(it / n_iters * 10000)`.
    assert [share_at(query, 1000, 0.8) for query in (1, 2, 5, 6, 21, 801)] == [0.8 / d for d in (1, 2, 2, 4, 8, 512)]
    assert [share_at(query, 5, 0.3) for query in range(5)] == [0.3 / d for d in (1, 32, 64, 128, 256)]


@given(st.integers(0, 2**32 - 1), st.integers(1, 255), st.sampled_from(["square", "noise"]))
def test_no_question_leaves_the_ball(seed: int, radius: int, attack: str) -> None:
    random = np.random.default_rng(seed)
    # Half of the values are at an end of the range, where steps must be cut off and not wrap.
    clean = random.choice(np.asarray([0, 0, 1, 128, 254, 255, 255], np.uint8), (3, 5, 6, 3))
    seen: list[np.ndarray] = []
    labels = np.asarray([0, 1, 2])
    fixed = with_logits(toy(spec=spec_of()), lambda images: np.eye(3)[labels[: len(images)]])
    victim = victim_of(recording(fixed, seen), clean, labels, radius)
    if attack == "square":
        square(victim, draws_of(3, seed), queries=8, tick=no_tick)
    else:
        noise(victim, draws_of(3, seed), draws=8, tick=no_tick)
    assert len(seen) == 8
    for asked in seen:
        assert asked.dtype == np.uint8
        change = asked.astype(int) - clean
        assert np.abs(change).max() <= radius
        # As far as it may go in every value: to ±ε, or the end of the range.
        assert np.all((np.abs(change) == radius) | (asked == 0) | (asked == 255))
    assert len({asked.tobytes() for asked in seen}) > 1


@given(st.integers(0, 2**32 - 1), st.floats(1, 20))
def test_rounding_stays_in_the_ball_of_a_fractional_epsilon(seed: int, epsilon: float) -> None:
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
    with pytest.raises(ConfigError, match=r"found 0.0157.*0.0157 of 1 would be 4"):
        radius_of(0.0157)


def test_what_leaves_the_ball_is_refused() -> None:
    clean = np.full((1, 2, 2, 3), 250, np.uint8)
    with pytest.raises(VerificationError, match="changed a pixel by 5/255; ε allows 4/255"):
        check_within(clean + np.uint8(5), clean, 4, "square")
    with pytest.raises(VerificationError, match="by 6/255"):  # 250 + 6 would be 0 if it wrapped; 244 is 6 away
        check_within(clean - np.uint8(6), clean, 4, "square")
    with pytest.raises(VerificationError, match="float64"):
        check_within(clean.astype(float), clean, 4, "square")


def test_queries_are_counted_and_the_fooled_are_left_alone() -> None:
    """A model that gives up on image 1 at its third question, and never on the others."""
    clean = np.stack([np.full((6, 6, 3), level, np.uint8) for level in (50, 100, 150)])
    labels = np.zeros(3, np.int64)
    asked = np.zeros(3, int)

    def logits(images: np.ndarray) -> np.ndarray:
        answers = np.tile([1.0, 0.0, 0.0], (len(images), 1))
        for place, image in enumerate(images):
            which = int(np.abs(np.asarray([50, 100, 150]) - image.mean()).argmin())
            asked[which] += 1
            if which == 1 and asked[1] == 3:
                answers[place] = [0.0, 1.0, 0.0]
        return answers

    model = with_logits(toy(spec=spec_of()), logits)
    victim = victim_of(model, clean, labels, 4)
    square(victim, draws_of(3), queries=20, tick=no_tick)
    assert victim.queries_N.tolist() == asked.tolist() == [20, 3, 20]
    assert victim.standing_N.tolist() == [True, False, True]
    unasked = Victim(model, clean, labels, np.asarray([True, False, True]), 4, "square")
    square(unasked, draws_of(3), queries=1, tick=no_tick)
    assert unasked.queries_N.tolist() == [1, 0, 1]


def test_answers_that_are_not_finite_count_as_wrong() -> None:
    clean, labels = np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.int64)
    model = with_logits(toy(spec=spec_of()), lambda images: np.full((len(images), 3), np.nan))
    victim = victim_of(model, clean, labels, 4)
    noise(victim, draws_of(2), draws=5, tick=no_tick)
    assert not victim.standing_N.any()
    assert victim.queries_N.tolist() == [1, 1]


def test_square_finds_what_noise_does_not(digits: tuple[Model, Model]) -> None:
    for model in digits:
        images, labels = held_digits(model, 60)
        left = {}
        for name in ("square", "noise"):
            victim = victim_of(model, images, labels, 16)
            if name == "square":
                square(victim, draws_of(60), queries=150, tick=no_tick)
            else:
                noise(victim, draws_of(60), draws=150, tick=no_tick)
            left[name] = victim.standing_N.mean()
        assert left["square"] < left["noise"] - 0.3, left


def test_an_image_has_the_same_luck_in_any_company(digits: tuple[Model, Model]) -> None:
    model, _ = digits
    images, labels = held_digits(model, 12)

    def attacked(order: list[int]) -> dict[int, tuple[bool, int]]:
        victim = victim_of(model, images[order], labels[order], 24)
        draws = draws_of(12)
        square(victim, [draws[place] for place in order], queries=40, tick=no_tick)
        return {
            place: (bool(standing), int(queries))
            for place, standing, queries in zip(order, victim.standing_N, victim.queries_N, strict=True)
        }

    together = attacked(list(range(12)))
    assert attacked([11, 3, 7]) == {place: together[place] for place in (11, 3, 7)}
    assert attacked(list(range(11, -1, -1))) == together


@pytest.mark.parametrize("which", [0, 1], ids=["fp32", "int8"])
def test_within_three_points_of_arts_square_on_the_same_file(digits: tuple[Model, Model], which: int) -> None:
    pytest.importorskip("art", reason="needs adversarial-robustness-toolbox")
    from art.attacks.evasion import SquareAttack
    from art.estimators.classification.blackbox import BlackBoxClassifierNeuralNetwork

    model = digits[which]
    images, labels = held_digits(model, 200)
    radius, queries = 16, 100

    def predict(pixels: np.ndarray) -> np.ndarray:
        # What ART tries is of whole gray levels: the images and ε are.
        return model.logits(np.rint(pixels * 255).astype(np.uint8))

    classifier = BlackBoxClassifierNeuralNetwork(
        predict, images.shape[1:], 10, channels_first=False, clip_values=(0.0, 1.0)
    )
    attack = SquareAttack(classifier, max_iter=queries - 1, eps=radius / 255, p_init=0.8, verbose=False)
    ours, theirs = [], []
    for seed in range(3):
        victim = victim_of(model, images, labels, radius)
        square(victim, draws_of(len(labels), seed), queries=queries, tick=no_tick)
        ours.append(victim.standing_N.mean())
        np.random.seed(seed)
        attacked = attack.generate(images.astype(np.float32) / 255, labels)
        theirs.append((predict(attacked).argmax(1) == labels).mean())
    assert 0.4 < np.mean(theirs) < 0.7
    assert abs(np.mean(ours) - np.mean(theirs)) < 0.03, (ours, theirs)
