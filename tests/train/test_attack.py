import copy

import pytest
import timm
import torch
from torch import nn

from train.attack import LinfPGD, Randomness, accuracy, evaluation_attack, frozen
from train.config import AttackConfig
from train.dual_bn import add_auxiliary_bns, route
from train.samples import BAD_LABEL

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
    assert change.max() >= 0.99 * epsilon / 255  # in pixels, on every channel
    assert change.amax((0, 2, 3)).min() >= 0.99 * epsilon / 255
    assert found.min() >= -1e-6
    assert found.max() <= 1 + 1e-6


def test_pixels_outside_the_range_move_by_at_most_epsilon(model: nn.Module) -> None:
    torch.manual_seed(0)
    images = 5 * torch.randn(4, 3, 32, 32)  # like the noise of random erasing
    attack = LinfPGD(AttackConfig(), *INCEPTION)
    attacked = attack(model, images, torch.randint(0, 5, (4,)), "adv")
    assert (attacked - images).abs().max() <= 2 / 255 + 1e-5


def test_attack_does_not_change_the_model(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)
    frozen_one = next(model.parameters())
    frozen_one.requires_grad_(False)
    model.get_submodule("layer1").eval()
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


def test_frozen_parameters_have_no_gradient() -> None:
    model = nn.Linear(3, 2)
    with frozen(model):
        assert not model(torch.rand(1, 3)).requires_grad
    assert model(torch.rand(1, 3)).requires_grad


def test_gradient_uses_the_running_statistics_of_the_auxiliary_route(model: nn.Module) -> None:
    """The main statistics and the other images of the batch have no influence."""
    attack = LinfPGD(AttackConfig(clean_start_share=1.0, targeted=False), *INCEPTION)
    images, labels = torch.rand(4, 3, 32, 32), torch.randint(0, 5, (4,))
    expected = attack(model, images, labels, "adv")
    other = copy.deepcopy(model)
    for name, buffer in other.named_buffers():
        if "running" in name and ".aux." not in name:
            buffer.add_(1.0)
    assert torch.equal(attack(other, images, labels, "adv"), expected)
    alone = attack(model, images[:1], labels[:1], "adv")
    assert (alone != expected[:1]).float().mean() < 0.01  # rounding may flip the sign of a tiny gradient
    for name, buffer in other.named_buffers():
        if name.endswith("running_mean") and ".aux." in name:
            buffer.add_(torch.randn_like(buffer))
    assert not torch.equal(attack(other, images, labels, "adv"), expected)


def test_targets_are_all_the_wrong_classes() -> None:
    attack = LinfPGD(AttackConfig(), *INCEPTION)
    labels = torch.arange(5).repeat(200)
    goals = attack.goal(labels, 5)
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
def test_attack_increases_the_loss_more_than_noise_does(model: nn.Module) -> None:
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


class Brightness(nn.Module):
    """Class 1 for bright images, class 0 for dark ones."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = self.norm(x).mean((1, 2, 3))
        return torch.stack([-mean, mean], 1)


def flat_images(*brightness: float) -> torch.Tensor:
    return torch.tensor(brightness).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()


BATCHES = [
    (flat_images(-0.5, 0.5, 0.01, -0.01), torch.tensor([0, 1, 1, 0])),
    (flat_images(0.5, -0.5, 0.3), torch.tensor([0, 0, BAD_LABEL])),
]


def test_accuracy_does_not_count_bad_images() -> None:
    assert accuracy(Brightness(), BATCHES) == 5 / 6
    assert accuracy(Brightness(), []) == 0


def test_accuracy_under_attack() -> None:
    """ε = 4/255 of the pixel range is 8/255 here: it changes the class of the images at ±0.01."""
    model = Brightness().train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert accuracy(model, BATCHES, evaluation_attack(4, *INCEPTION)) == 3 / 6
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert model.norm.num_batches_tracked == 0


def test_accuracy_of_each_route() -> None:
    model = add_auxiliary_bns(Brightness(), ["adv"])
    model.get_submodule("norm.aux.adv").get_parameter("weight").data.fill_(-1)
    assert accuracy(model, BATCHES, bn="adv") == 1 / 6
    assert accuracy(model, BATCHES) == 5 / 6


def test_accuracy_of_a_single_image() -> None:
    assert accuracy(Brightness(), [(flat_images(0.5), torch.tensor([1]))]) == 1.0


class Fixed(Randomness):
    """The same noise for every pixel, the smallest number for every image, and one distance for every target."""

    def __init__(self, noise: float = 0.0, distance: int = 1) -> None:
        self._noise, self._distance = noise, distance

    def noise(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return torch.full_like(images_NCHW, self._noise)

    def chance(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return torch.zeros(images_NCHW.shape[0], 1, 1, 1)

    def shift(self, labels_N: torch.Tensor, classes: int) -> torch.Tensor:
        return torch.full_like(labels_N, self._distance)


def test_bounds_are_epsilon_and_the_pixel_range() -> None:
    pixels = torch.linspace(0, 1, 256).expand(1, 3, 1, 256)
    ball = LinfPGD(AttackConfig(epsilon=4), *IMAGENET).ball(normalized(pixels, *IMAGENET))
    lowest, highest = (as_pixels(bound, *IMAGENET) for bound in (ball.lowest, ball.highest))
    torch.testing.assert_close(lowest, (pixels - 4 / 255).clamp(min=0), rtol=0, atol=1e-6)
    torch.testing.assert_close(highest, (pixels + 4 / 255).clamp(max=1), rtol=0, atol=1e-6)


def test_start_points_are_uniform_within_epsilon() -> None:
    attack = LinfPGD(AttackConfig(epsilon=4, clean_start_share=0.0), *IMAGENET)
    clean = normalized(torch.full((64, 3, 32, 32), 0.5), *IMAGENET)
    torch.manual_seed(0)
    offset = (as_pixels(attack.start(attack.ball(clean)), *IMAGENET) - 0.5) * 255 / 4
    assert offset.min() == pytest.approx(-1, abs=1e-3)
    assert offset.max() == pytest.approx(1, abs=1e-3)
    assert offset.mean() == pytest.approx(0, abs=0.01)
    assert offset.square().mean() == pytest.approx(1 / 3, abs=0.01)


def test_without_clean_starts_the_smallest_random_number_also_starts_with_noise() -> None:
    attack = LinfPGD(AttackConfig(epsilon=1, clean_start_share=0.0), *INCEPTION, Fixed(noise=1.0))
    images = flat_images(0.0, 0.5)
    torch.testing.assert_close(attack.start(attack.ball(images)), images + 2 / 255)


def test_random_numbers_and_bounds_are_on_the_device_of_the_images() -> None:
    images, labels = torch.zeros(2, 3, 4, 4, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    random = Randomness()
    assert {values.device for values in LinfPGD(AttackConfig(), *INCEPTION).ball(images)} == {images.device}
    for drawn in (random.noise(images), random.chance(images), random.shift(labels, 5)):
        assert drawn.device == images.device


@pytest.mark.parametrize("targeted", [True, False])
def test_each_step_moves_every_pixel_by_the_step_size_toward_the_other_class(targeted: bool) -> None:
    config = AttackConfig(epsilon=4, steps=3, step_size=0.5, targeted=targeted)
    images = flat_images(-0.5, 0.5)
    attacked = LinfPGD(config, *IMAGENET, Fixed())(Brightness(), images, torch.tensor([0, 1]), "main")
    moved = as_pixels(attacked, *IMAGENET) - as_pixels(images, *IMAGENET)
    brighter = torch.full((3, 4, 4), 3 * 0.5 / 255)
    torch.testing.assert_close(moved, torch.stack([brighter, -brighter]), rtol=0, atol=1e-6)


def test_the_target_is_the_given_distance_behind_the_true_class() -> None:
    attack = LinfPGD(AttackConfig(), *INCEPTION, Fixed(distance=2))
    assert attack.goal(torch.tensor([0, 1, 4]), 5).tolist() == [2, 3, 1]


class Faint(nn.Module):
    """Gradients of 2e-9 per pixel in float16, whose smallest number is 6e-8."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = 1e-7 * x.to(torch.float16).to(torch.float32).mean((1, 2, 3))
        return torch.stack([-mean, mean], 1)


def test_small_gradients_do_not_vanish_in_float16_even_in_large_batches() -> None:
    attack = LinfPGD(AttackConfig(targeted=False), *INCEPTION, Fixed())
    images = flat_images(*[0.0] * 512)
    attacked = attack(Faint(), images, torch.zeros(512, dtype=torch.int64), "main")
    torch.testing.assert_close(attacked, images + 2 / 255)


def test_the_evaluation_attack_has_the_settings_of_madry_et_al() -> None:
    assert evaluation_attack(8, *INCEPTION, steps=10).config == AttackConfig(
        epsilon=8, steps=10, step_size=2.0, targeted=False, clean_start_share=0.0
    )
    assert evaluation_attack(8, *INCEPTION).config.steps == 5


def test_the_evaluation_attack_uses_the_given_random_numbers() -> None:
    attack = evaluation_attack(4, *INCEPTION, randomness=Fixed(noise=0.0))
    images = flat_images(0.0, 0.5)
    assert torch.equal(attack.start(attack.ball(images)), images)


@pytest.mark.parametrize("noise", [-1.0, 1.0])
def test_start_points_stay_in_the_pixel_range(noise: float) -> None:
    attack = LinfPGD(AttackConfig(epsilon=4, clean_start_share=0.0), *INCEPTION, Fixed(noise=noise))
    start = attack.start(attack.ball(flat_images(-1.0, 1.0)))  # black and white
    assert start.min() >= -1
    assert start.max() <= 1


def test_bfloat16_logits_are_attacked_like_their_float32_values() -> None:
    """On a CPU, autocast leaves the cross-entropy in the type of the logits."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))

    class Rounded(nn.Module):
        def __init__(self, widen: bool) -> None:
            super().__init__()
            self.network, self.widen = network, widen

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = self.network(images).bfloat16()
            return logits.float() if self.widen else logits

    images, labels = torch.rand(64, 3, 8, 8) * 2 - 1, torch.randint(0, 10, (64,))
    attack = LinfPGD(AttackConfig(epsilon=8.0), *INCEPTION)
    attacked = []
    for widen in (False, True):
        torch.manual_seed(1)
        attacked.append(attack(Rounded(widen), images, labels, "main"))
    assert torch.equal(*attacked)
