import torch
from torch import nn

from train.attack import evaluation_attack
from train.dual_bn import add_auxiliary_bns
from train.evaluate import accuracy
from train.samples import BAD_LABEL

HALF = (0.5, 0.5, 0.5)


class Brightness(nn.Module):
    """Class 1 for bright images, class 0 for dark ones."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = self.norm(x).mean((1, 2, 3))
        return torch.stack([-mean, mean], 1)


def images(*brightness: float) -> torch.Tensor:
    return torch.tensor(brightness).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()


BATCHES = [
    (images(-0.5, 0.5, 0.01, -0.01), torch.tensor([0, 1, 1, 0])),
    (images(0.5, -0.5, 0.3), torch.tensor([0, 0, BAD_LABEL])),
]


def test_right_answers_are_counted_and_bad_images_are_not() -> None:
    assert accuracy(Brightness(), BATCHES) == 5 / 6
    assert accuracy(Brightness(), []) == 0


def test_an_attack_takes_what_is_near_the_border() -> None:
    """ε = 4/255 of the pixel range is 8/255 here: the two images at ±0.01 fall, the others stand."""
    model = Brightness().train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert accuracy(model, BATCHES, evaluation_attack(4, HALF, HALF)) == 3 / 6
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert model.norm.num_batches_tracked == 0


def test_the_route_decides() -> None:
    model = add_auxiliary_bns(Brightness(), ["adv"])
    model.norm.aux["adv"].weight.data.fill_(-1)
    assert accuracy(model, BATCHES, bn="adv") == 1 / 6
    assert accuracy(model, BATCHES) == 5 / 6
