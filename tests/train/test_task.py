import copy

import pytest
import timm
import torch
from torch import nn

from runtime.errors import ConfigError
from train.config import AttackConfig
from train.dual_bn import add_auxiliary_bns, route
from train.recipes import RECIPES, Branch, auxiliary_routes, find_recipe
from train.task import AdvPropTask

HALF = (0.5, 0.5, 0.5)


def make_task(recipe: str, seed: int = 0) -> AdvPropTask:
    torch.manual_seed(seed)
    model = timm.create_model("resnet10t", num_classes=5)
    return AdvPropTask(model, RECIPES[recipe], attack=AttackConfig(), mean=HALF, std=HALF).train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.rand(6, 3, 32, 32) * 2 - 1, torch.randint(0, 5, (6,))


def statistics(model: nn.Module, auxiliary: bool) -> list[torch.Tensor]:
    return [
        buffer.clone() for name, buffer in model.named_buffers() if "running" in name and (".aux." in name) == auxiliary
    ]


def test_advprop_step_is_algorithm_1_written_out() -> None:
    task = make_task("advprop")
    images, labels = batch()
    model = copy.deepcopy(task.trainable_module)
    torch.manual_seed(7)
    task(images, labels)["loss"].backward()

    torch.manual_seed(7)
    attacked = task.attack(model, images, labels, "adv")
    loss = nn.functional.cross_entropy(model(images), labels)
    with route(model, "adv"):
        loss = loss + nn.functional.cross_entropy(model(attacked), labels)
    loss.backward()
    for (name, mine), reference in zip(task.trainable_module.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-3, atol=1e-5, msg=name)
    for mine, reference in zip(task.trainable_module.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "main_moves", "aux_moves"),
    [("vanilla", True, False), ("adversarial", True, False), ("shared-bn", True, False), ("advprop", True, True)],
)
def test_statistics_that_a_step_moves(recipe: str, main_moves: bool, aux_moves: bool) -> None:
    task = make_task(recipe)
    before = [statistics(task.trainable_module, auxiliary) for auxiliary in (False, True)]
    task(*batch())
    after = [statistics(task.trainable_module, auxiliary) for auxiliary in (False, True)]
    moved = [any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in zip(before, after, strict=True)]
    assert moved == [main_moves, aux_moves]


def test_clean_and_adversarial_images_of_shared_bn_share_batch_statistics() -> None:
    task = make_task("shared-bn")
    first = task.trainable_module.conv1
    seen = []
    first.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    task(*batch())
    assert seen[-1] == 12


def test_losses_are_reported_and_weighted() -> None:
    task = make_task("advprop")
    result = task(*batch())
    assert set(result) == {"loss", "output", "loss/clean", "loss/adv"}
    torch.testing.assert_close(result["loss"], result["loss/clean"] + result["loss/adv"])
    assert result["output"].shape == (6, 5)


def test_a_branch_may_see_a_share_of_the_batch() -> None:
    recipe = (RECIPES["advprop"][0], Branch(name="adv", source="pgd", bn="adv", share=0.5))
    model = timm.create_model("resnet10t", num_classes=5)
    task = AdvPropTask(model, recipe, attack=AttackConfig(), mean=HALF, std=HALF).train()
    sizes: list[int] = []
    model.bn1.aux["adv"].register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    task(*batch())
    assert sizes[-1] == 3


def test_a_recipe_without_auxiliary_routes_leaves_the_model_unconverted() -> None:
    task = make_task("vanilla")
    assert not any(".aux." in key for key in task.trainable_module.state_dict())
    assert auxiliary_routes(RECIPES["vanilla"]) == ()


def test_a_model_that_is_converted_already_is_taken_as_it_is() -> None:
    model = add_auxiliary_bns(timm.create_model("resnet10t", num_classes=5), ["adv"])
    AdvPropTask(model, RECIPES["advprop"], attack=AttackConfig(), mean=HALF, std=HALF)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean advprop"):
        find_recipe("advpro")
