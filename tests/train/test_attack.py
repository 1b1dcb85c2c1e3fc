import copy

import pytest
import timm
import torch
from torch import nn

from train.attack import LinfPGD, evaluation_attack, frozen
from train.config import AttackConfig
from train.dual_bn import add_auxiliary_bns, route

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INCEPTION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return add_auxiliary_bns(timm.create_model("resnet10t", num_classes=5), ["adv"]).train()


def normalized(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    return (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def as_pixels(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    return images * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)


@pytest.mark.parametrize(("mean", "std"), [IMAGENET, INCEPTION])
@pytest.mark.parametrize("epsilon", [1.0, 4.0])
@pytest.mark.parametrize("targeted", [True, False])
def test_attacked_images_stay_within_epsilon_and_the_pixel_range(
    model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], epsilon: float, targeted: bool
) -> None:
    torch.manual_seed(0)
    pixels = torch.rand(8, 3, 32, 32)
    pixels[:, :, :4] = 0.0
    pixels[:, :, -4:] = 1.0
    attack = LinfPGD(AttackConfig(epsilon=epsilon, targeted=targeted), mean, std)
    attacked = attack(model, normalized(pixels, mean, std), torch.randint(0, 5, (8,)), "adv")
    found = as_pixels(attacked, mean, std)
    change = (found - pixels).abs()
    assert change.max() <= epsilon / 255 + 1e-6
    assert change.max() >= 0.99 * epsilon / 255  # the bound is in pixels on every channel, not less
    assert change.amax((0, 2, 3)).min() >= 0.99 * epsilon / 255
    assert found.min() >= -1e-6
    assert found.max() <= 1 + 1e-6


def test_pixels_that_augmentation_put_outside_the_range_move_by_epsilon_at_most(model: nn.Module) -> None:
    torch.manual_seed(0)
    images = 5 * torch.randn(4, 3, 32, 32)  # as random erasing's noise does
    attack = LinfPGD(AttackConfig(), *INCEPTION)
    attacked = attack(model, images, torch.randint(0, 5, (4,)), "adv")
    assert (attacked - images).abs().max() <= 2 / 255 + 1e-5


def test_the_model_is_left_as_it_was_found(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)
    frozen_one = next(model.parameters())
    frozen_one.requires_grad_(False)
    model.layer1.eval()
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    LinfPGD(AttackConfig(), *INCEPTION)(model, torch.rand(4, 3, 32, 32), torch.randint(0, 5, (4,)), "adv")
    try:
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert [parameter.requires_grad for parameter in model.parameters()].count(False) == 1
        assert [module.training for module in model.modules()] == modes
    finally:
        frozen_one.requires_grad_(True)
        model.train()


def test_no_weight_gradient_is_computed() -> None:
    model = nn.Linear(3, 2)
    with frozen(model):
        assert not model(torch.rand(1, 3)).requires_grad
    assert model(torch.rand(1, 3)).requires_grad


def test_the_gradient_goes_through_the_running_statistics_of_the_auxiliary_route(model: nn.Module) -> None:
    """Neither the main statistics nor the other images of the batch have a say."""
    attack = LinfPGD(AttackConfig(clean_start_share=1.0, targeted=False), *INCEPTION)
    images, labels = torch.rand(4, 3, 32, 32), torch.randint(0, 5, (4,))
    expected = attack(model, images, labels, "adv")
    other = copy.deepcopy(model)
    for name, buffer in other.named_buffers():
        if "running" in name and ".aux." not in name:
            buffer.add_(1.0)
    assert torch.equal(attack(other, images, labels, "adv"), expected)
    alone = attack(model, images[:1], labels[:1], "adv")
    assert (alone != expected[:1]).float().mean() < 0.01  # float noise may flip a sign of a tiny gradient
    for name, buffer in other.named_buffers():
        if name.endswith("running_mean") and ".aux." in name:
            buffer.add_(torch.randn_like(buffer))
    assert not torch.equal(attack(other, images, labels, "adv"), expected)


def test_targets_are_wrong_classes_and_all_of_them() -> None:
    attack = LinfPGD(AttackConfig(), *INCEPTION)
    labels = torch.arange(5).repeat(200)
    goals = attack._goal(labels, 5)
    assert not (goals == labels).any()
    assert {(int(label), int(goal)) for label, goal in zip(labels, goals, strict=True)} == {
        (i, j) for i in range(5) for j in range(5) if i != j
    }


def test_share_of_clean_starts() -> None:
    attack = LinfPGD(AttackConfig(clean_start_share=0.2), *INCEPTION)
    noise = attack.start(attack.ball(torch.zeros(4000, 3, 2, 2)))
    clean = (noise.abs().amax((1, 2, 3)) == 0).float().mean()
    assert clean == pytest.approx(0.2, abs=0.03)
    assert noise.abs().max() <= 2 / 255 + 1e-7


def test_published_number_of_steps() -> None:
    assert [AttackConfig(epsilon=e).resolved_steps for e in (1, 2, 3, 4)] == [1, 3, 4, 5]
    assert AttackConfig(epsilon=4, steps=7).resolved_steps == 7


@torch.no_grad()
def test_attack_does_more_than_noise_of_the_same_size(model: nn.Module) -> None:
    images, labels = torch.rand(8, 3, 32, 32), torch.randint(0, 5, (8,))
    attack = evaluation_attack(8, *INCEPTION)
    attacked = attack(model, images, labels, "main")
    noisy = images + (attacked - images).abs() * torch.randn_like(images).sign()
    model.eval()
    try:
        with route(model, "main"):
            clean, noise, after = (
                nn.functional.cross_entropy(model(batch), labels).item() for batch in (images, noisy, attacked)
            )
    finally:
        model.train()
    assert after - clean > 3 * abs(noise - clean)
