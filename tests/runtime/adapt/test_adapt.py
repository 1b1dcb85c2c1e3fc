"""Verdicts, and the limit on clean images."""

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx
import pytest

from export.to_onnx import to_onnx
from runtime.adapt.adapt import AdaptConfig, CleanImages, adapt
from runtime.adapt.confidence import CleanConfidence, read_confidence, with_confidence
from runtime.adapt.moments import with_clean_moments
from runtime.adapt.verdict import Verdict
from runtime.errors import ConfigError, ModelFileError
from runtime.evaluate.corruptions import corrupt
from runtime.graph.model import run_batches
from runtime.graph.norms import NORMS_KEY
from runtime.graph.structure import set_metadata
from runtime.preprocessing import normalize
from tests.support.evaluation_sets import COLORS, picture, spec_of
from tests.support.norm_networks import Colors

SPEC = spec_of()


def pictures(count: int, first: int = 0) -> np.ndarray:
    """Return `count` pictures of each color."""
    return np.stack([picture(color, first + number) for number in range(count) for color in COLORS])


def foggy(images_NHWC: np.ndarray) -> np.ndarray:
    return np.stack([corrupt(image, "fog", 5, key=number) for number, image in enumerate(images_NHWC)])


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    inputs = normalize(pictures(20, 100), SPEC.preprocessing)
    return with_clean_moments(to_onnx(Colors(inputs).eval(), SPEC), [inputs])


def test_images_of_a_shifted_place_are_adapted_to(model: onnx.ModelProto) -> None:
    found = adapt(model, foggy(pictures(12)))
    assert found.verdict is Verdict.ADAPT
    assert (found.images, len(found.layers)) == (36, 1)
    assert 0.9 < found.evidence <= 1 and 0.3 < found.weight <= 1 / 3
    assert found.expected_accuracy is None


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (lambda: pictures(12), Verdict.NOT_SHIFTED),
        (lambda: foggy(pictures(2)), Verdict.TOO_FEW),
        (lambda: np.stack([picture("red", number) for number in range(36)]), Verdict.ONE_CLASS),
    ],
)
def test_images_that_cannot_help_are_recognized(
    model: onnx.ModelProto, images: Callable[[], np.ndarray], expected: Verdict
) -> None:
    found = adapt(model, images())
    assert (found.verdict, found.verdict.adapts) == (expected, False)


def test_a_fixed_prior_sets_the_weight_and_does_not_change_the_verdict(model: onnx.ModelProto) -> None:
    shifted = adapt(model, foggy(pictures(12)), AdaptConfig(prior=12))
    assert shifted.verdict is Verdict.ADAPT
    assert shifted.weight == pytest.approx(36 / 48)
    assert adapt(model, pictures(12), AdaptConfig(prior=12)).verdict is Verdict.NOT_SHIFTED


def undecided_images(model: onnx.ModelProto) -> CleanImages:
    """Return mixtures of two colors, for which small changes of the model change the prediction."""
    shares = np.linspace(0.3, 0.7, 41)
    mixed = [share * picture("red", n) + (1 - share) * picture("blue", n) for n, share in enumerate(shares)]
    images = np.stack(mixed).astype(np.uint8)
    logits = run_batches(model, [normalize(images, SPEC.preprocessing)])
    return CleanImages(images_NHWC=images, labels_N=logits.argmax(1))


def reddish(images_NHWC: np.ndarray) -> np.ndarray:
    return np.clip(images_NHWC.astype(int) + np.asarray([60, 0, 0]), 0, 255).astype(np.uint8)


def test_the_loss_on_clean_images_is_limited_by_a_larger_prior(model: onnx.ModelProto) -> None:
    field, clean = reddish(pictures(12)), undecided_images(model)
    free = adapt(model, field, AdaptConfig(max_clean_loss=100), clean=clean)
    assert free.clean is not None and free.verdict is Verdict.ADAPT
    assert free.clean.before.top1 == 1 and free.clean.loss > 5
    limited = adapt(model, field, AdaptConfig(max_clean_loss=free.clean.loss - 3), clean=clean)
    assert limited.clean is not None and limited.verdict is Verdict.LARGER_PRIOR
    assert limited.clean.loss < free.clean.loss and limited.weight < free.weight
    for prior in (0, None):
        refused = adapt(model, field, AdaptConfig(prior=prior, max_clean_loss=0), clean=clean)
        assert refused.verdict is Verdict.CLEAN_LOSS


def test_expected_accuracy_is_confidence_corrected_on_clean_images(model: onnx.ModelProto) -> None:
    images = pictures(20, 200)
    labels = np.arange(len(images)) % len(COLORS)
    logits = run_batches(model, [normalize(images, SPEC.preprocessing)])
    recorded = with_confidence(model, logits, labels)
    found = adapt(recorded, foggy(pictures(12)))
    gap = read_confidence(recorded)
    assert gap is not None and found.expected_accuracy is not None
    assert found.expected_accuracy[1] == pytest.approx(
        min(1, found.after.confidence + (logits.argmax(1) == labels).mean() - gap.confidence)
    )
    assert CleanConfidence(images=9, top1=0.9, confidence=0.7).expected_accuracy(0.95) == 1


def test_models_that_cannot_be_adapted_are_reported(model: onnx.ModelProto) -> None:
    for changes, message in (
        ({NORMS_KEY: ""}, "no record of its BatchNorms"),
        ({"advprop.adaptation": "{}"}, "already adapted"),
        ({"advprop.spec": dataclasses.replace(SPEC, output_form="topk").to_json()}, "most probable classes only"),
    ):
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        set_metadata(changed, changes)
        with pytest.raises(ModelFileError, match=message):
            adapt(changed, pictures(4))


def test_without_statistics_of_clean_images_a_prior_or_clean_images_are_needed() -> None:
    inputs = normalize(pictures(20, 100), SPEC.preprocessing)
    bare = to_onnx(Colors(inputs).eval(), SPEC)
    with pytest.raises(ConfigError, match="--clean DIR"):
        adapt(bare, foggy(pictures(12)))
    assert adapt(bare, foggy(pictures(12)), AdaptConfig(prior=64)).weight == pytest.approx(0.36)
    clean = CleanImages(images_NHWC=pictures(20, 200), labels_N=np.arange(60) % 3)
    assert adapt(bare, pictures(12), clean=clean).verdict is Verdict.NOT_SHIFTED


@pytest.mark.parametrize("values", [{"images": 0}, {"prior": -1.0}, {"max_clean_loss": 101.0}])
def test_invalid_settings_are_reported(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        AdaptConfig(**values)  # type: ignore[arg-type]
