"""Gradient attacks on digits, compared with ART."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from advprop.checkpoints.attacker import gradient_attacks
from runtime.errors import ConfigError
from runtime.evaluate.attacks.methods import Craft
from runtime.evaluate.models import Model, load_model
from tests.support.attack_sets import held_digits, torch_digit_net
from tests.support.report_sets import digit_net

RADIUS = 3


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digit_net(tmp_path_factory.mktemp("digits") / "net.onnx")


@pytest.fixture(scope="module")
def model(file: Path) -> Model:
    return load_model(file, device="cpu", threads=1)


@pytest.fixture(scope="module")
def network(file: Path) -> nn.Module:
    return torch_digit_net(file)


def attacked_copies(
    network: nn.Module, model: Model, attack: str, places: slice = slice(100), **options: int
) -> np.ndarray:
    """Return adversarial copies of digits that the network classifies correctly."""
    craft: Craft = gradient_attacks(network, model.spec, torch.device("cpu"))
    images, labels = held_digits(model, 100)
    seeds = list(range(10**30, 10**30 + 100))[places]
    return craft(
        attack, images[places], labels[places], radius=RADIUS, seeds=seeds, **{"steps": 20, "restarts": 1, **options}
    )


def share_robust(model: Model, attacked: np.ndarray) -> float:
    """Return the share of images whose copies are all classified correctly by the ONNX file."""
    labels = held_digits(model, 100)[1]
    return float(np.all([model.logits(copy).argmax(1) == labels for copy in attacked], axis=0).mean())


def test_copies_are_in_the_ball_and_depend_on_their_own_image_only(network: nn.Module, model: Model) -> None:
    images, _ = held_digits(model, 100)
    for attack, copies in (("pgd", 2), ("apgd", 4)):
        attacked = attacked_copies(network, model, attack, slice(30), restarts=2, steps=5)
        assert attacked.shape == (copies, 30, 16, 16, 3)
        assert attacked.dtype == np.uint8
        assert np.abs(attacked.astype(int) - images[:30]).max() == RADIUS
        assert np.array_equal(attacked_copies(network, model, attack, slice(30), restarts=2, steps=5), attacked)
        alone = attacked_copies(network, model, attack, slice(7, 9), restarts=2, steps=5)
        # Another batch size rounds differently, which flips signs of gradients near 0.
        assert (alone != attacked[:, 7:9]).mean() < 0.01
    with pytest.raises(ConfigError, match="unknown gradient attack 'fgsm'"):
        attacked_copies(network, model, "fgsm")


def test_two_classes_skip_the_dlr_loss(network: nn.Module, model: Model) -> None:
    two = nn.Sequential(network, nn.Linear(10, 2))
    craft = gradient_attacks(two, dataclasses.replace(model.spec, classes=("even", "odd")), torch.device("cpu"))
    images, _ = held_digits(model, 4)
    labels = np.zeros(4, np.int64)
    assert len(craft("apgd", images, labels, radius=4, seeds=[1, 2, 3, 4], steps=2, restarts=1)) == 1


def test_attacks_are_as_strong_as_arts(network: nn.Module, model: Model) -> None:
    """Network, images and ε are the same. ART's copies are rounded too and evaluated on the ONNX file."""
    pytest.importorskip("art", reason="needs adversarial-robustness-toolbox")
    from art.attacks.evasion import AutoProjectedGradientDescent, ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    images, labels = held_digits(model, 100)
    pixels = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
    size, spec = RADIUS / 255, model.spec.preprocessing
    normalization = tuple(np.asarray(part, np.float32).reshape(3, 1, 1) for part in (spec.mean, spec.std))
    classifier = PyTorchClassifier(
        network, nn.CrossEntropyLoss(), pixels.shape[1:], 10, clip_values=(0.0, 1.0), preprocessing=normalization,
        device_type="cpu",
    )  # fmt: skip

    def robust_to_art(attack: object) -> float:
        np.random.seed(0)
        attacked = attack.generate(pixels, labels)  # type: ignore[attr-defined]
        copies = np.rint(attacked.transpose(0, 2, 3, 1) * 255).astype(np.uint8)
        assert np.abs(copies.astype(int) - images).max() <= RADIUS
        return share_robust(model, copies[None])

    pgd = ProjectedGradientDescent(
        classifier, eps=size, eps_step=2.5 * size / 20, max_iter=20, num_random_init=1, batch_size=100, verbose=False
    )
    ours = share_robust(model, attacked_copies(network, model, "pgd"))
    assert 0.1 < ours < 0.9
    assert ours == pytest.approx(robust_to_art(pgd), abs=0.05)
    found = {}
    for place, loss in enumerate(("cross_entropy", "difference_logits_ratio")):
        apgd = AutoProjectedGradientDescent(
            classifier, eps=size, eps_step=2 * size, max_iter=20, nb_random_init=1, batch_size=100, loss_type=loss,
            verbose=False,
        )  # fmt: skip
        found[loss] = (
            share_robust(model, attacked_copies(network, model, "apgd")[place : place + 1]),
            robust_to_art(apgd),
        )
        assert found[loss][0] <= found[loss][1] + 0.05, found
    # Both losses together are as strong as PGD with the same number of steps, up to rounding.
    assert share_robust(model, attacked_copies(network, model, "apgd")) <= ours + 0.02
