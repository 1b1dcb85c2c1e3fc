"""Auto-PGD against the paper and ART, and what a checkpoint shows to model files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from advprop.checkpoints.attacker import crafter
from runtime.errors import ConfigError
from runtime.evaluate.attacks.methods import Craft
from runtime.evaluate.models import Model, load_model
from tests.support.attack_sets import held_digits, torch_digit_net
from tests.support.report_sets import digit_net
from train.apgd import checkpoints, dlr

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


def made(network: nn.Module, model: Model, attack: str, places: slice = slice(100), **options: int) -> np.ndarray:
    """Attacked copies of digits that the network gets right."""
    craft: Craft = crafter(network, model.spec, torch.device("cpu"))
    images, labels = (array[places] for array in held_digits(model, 100))
    seeds = list(range(10**30, 10**30 + 100))[places]
    return craft(attack, images, labels, radius=RADIUS, seeds=seeds, **{"steps": 20, "restarts": 1, **options})


def robust(model: Model, attacked: np.ndarray) -> float:
    """Top-1 of the ONNX file on images of which every copy must be right."""
    labels = held_digits(model, 100)[1]
    return float(np.all([model.logits(copy).argmax(1) == labels for copy in attacked], axis=0).mean())


def test_the_step_is_looked_at_when_the_paper_says() -> None:
    # p = 0, 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, then every 0.06: section 3.1.
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1) == [1]
    assert checkpoints(10) == [3, 5, 6, 7, 8, 9, 10]


def test_the_dlr_loss_is_the_papers() -> None:
    logits = torch.tensor([[5.0, 3.0, 1.0, 0.0], [5.0, 3.0, 1.0, 0.0]])
    # Right: −(5 − 3) / (5 − 1). Wrong, label 2: −(1 − 5) / (5 − 1).
    assert dlr(logits, torch.tensor([0, 2])).tolist() == pytest.approx([-0.5, 1.0])
    assert torch.allclose(dlr(7 * logits, torch.tensor([0, 2])), dlr(logits, torch.tensor([0, 2])))


def test_what_is_made_is_in_the_ball_and_depends_on_its_own_image_only(network: nn.Module, model: Model) -> None:
    images, _ = held_digits(model, 100)
    for attack, copies in (("pgd", 2), ("apgd", 4)):
        attacked = made(network, model, attack, slice(30), restarts=2, steps=5)
        assert attacked.shape == (copies, 30, 16, 16, 3)
        assert attacked.dtype == np.uint8
        assert np.abs(attacked.astype(int) - images[:30]).max() == RADIUS
        assert np.array_equal(made(network, model, attack, slice(30), restarts=2, steps=5), attacked)
        alone = made(network, model, attack, slice(7, 9), restarts=2, steps=5)
        # Batches of another size give other float noise, which turns the sign of gradients that are about 0.
        assert (alone != attacked[:, 7:9]).mean() < 0.01
    with pytest.raises(ConfigError, match="no attack 'fgsm' by gradient"):
        made(network, model, "fgsm")


def test_two_classes_have_no_dlr(network: nn.Module, model: Model) -> None:
    two = nn.Sequential(network, nn.Linear(10, 2))
    craft = crafter(two, dataclasses.replace(model.spec, classes=("even", "odd")), torch.device("cpu"))
    images, _ = held_digits(model, 4)
    labels = np.zeros(4, np.int64)
    assert len(craft("apgd", images, labels, radius=4, seeds=[1, 2, 3, 4], steps=2, restarts=1)) == 1


def test_as_strong_as_arts_pgd_and_apgd(network: nn.Module, model: Model) -> None:
    """On the same network, images and ε; ART's copies are rounded as ours are, and shown to the ONNX file."""
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

    def theirs(attack: object) -> float:
        np.random.seed(0)
        attacked = attack.generate(pixels, labels)  # type: ignore[attr-defined]
        copies = np.rint(attacked.transpose(0, 2, 3, 1) * 255).astype(np.uint8)
        assert np.abs(copies.astype(int) - images).max() <= RADIUS
        return robust(model, copies[None])

    pgd = ProjectedGradientDescent(
        classifier, eps=size, eps_step=2.5 * size / 20, max_iter=20, num_random_init=1, batch_size=100, verbose=False
    )
    ours = robust(model, made(network, model, "pgd"))
    assert 0.1 < ours < 0.9
    assert ours == pytest.approx(theirs(pgd), abs=0.05)
    found = {}
    for place, loss in enumerate(("cross_entropy", "difference_logits_ratio")):
        apgd = AutoProjectedGradientDescent(
            classifier, eps=size, eps_step=2 * size, max_iter=20, nb_random_init=1, batch_size=100, loss_type=loss,
            verbose=False,
        )  # fmt: skip
        found[loss] = (robust(model, made(network, model, "apgd")[place : place + 1]), theirs(apgd))
        assert found[loss][0] <= found[loss][1] + 0.05, found
    # Both losses together are at least as strong as PGD of as many steps, but for rounding and starts.
    assert robust(model, made(network, model, "apgd")) <= ours + 0.02
