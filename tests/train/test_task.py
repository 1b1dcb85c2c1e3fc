import copy
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from runtime.errors import ConfigError
from train.attack import LinfPGD
from train.config import AttackConfig
from train.dual_bn import add_auxiliary_bns, frozen_statistics, route
from train.recipes import RECIPES, Branch, Recipe, find_recipe
from train.task import AdvPropTask

HALF = (0.5, 0.5, 0.5)
ATTACK = LinfPGD(AttackConfig(), HALF, HALF)


def make_task(recipe: str) -> AdvPropTask:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    return AdvPropTask(model, RECIPES[recipe], ATTACK).train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.rand(6, 3, 32, 32) * 2 - 1, torch.randint(0, 5, (6,))


def statistics(model: nn.Module, auxiliary: bool) -> list[torch.Tensor]:
    return [
        buffer.clone() for name, buffer in model.named_buffers() if "running" in name and (".aux." in name) == auxiliary
    ]


def test_advprop_step_equals_algorithm_1() -> None:
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
    for (name, own), reference in zip(task.trainable_module.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own.grad, reference.grad, rtol=1e-3, atol=1e-5, msg=name)
    for own, reference in zip(task.trainable_module.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "main_changes", "auxiliary_changes"),
    [("vanilla", True, False), ("adversarial", True, False), ("shared-bn", True, False), ("advprop", True, True)],
)
def test_a_step_updates_the_statistics_of_its_routes(recipe: str, main_changes: bool, auxiliary_changes: bool) -> None:
    task = make_task(recipe)
    before = [statistics(task.trainable_module, auxiliary) for auxiliary in (False, True)]
    task(*batch())
    after = [statistics(task.trainable_module, auxiliary) for auxiliary in (False, True)]
    changed = [not all(map(torch.equal, *pair)) for pair in zip(before, after, strict=True)]
    assert changed == [main_changes, auxiliary_changes]


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


def test_a_branch_can_use_a_share_of_the_batch() -> None:
    adversarial = Branch(name="adv", source="pgd", bn="adv", end=0.5)
    recipe = Recipe(branches=(RECIPES["advprop"].branches[0], adversarial))
    model = timm.create_model("resnet10t", num_classes=5)
    task = AdvPropTask(model, recipe, ATTACK).train()
    sizes: list[int] = []
    model.bn1.aux["adv"].register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    task(*batch())
    assert sizes[-1] == 3


def test_a_recipe_without_auxiliary_routes_does_not_convert_the_model() -> None:
    task = make_task("vanilla")
    assert not any(".aux." in key for key in task.trainable_module.state_dict())
    assert RECIPES["vanilla"].auxiliary_routes == ()


def test_a_converted_model_is_accepted() -> None:
    model = add_auxiliary_bns(timm.create_model("resnet10t", num_classes=5), ["adv"])
    task = AdvPropTask(model, RECIPES["advprop"], ATTACK).train()
    assert set(task(*batch())) > {"loss/clean", "loss/adv"}


def test_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean advprop"):
        find_recipe("advpro")


def test_fine_grained_uses_a_route_for_the_autoaugment_view() -> None:
    task = make_task("fine-grained")
    images, labels = batch()
    seen: dict[str, torch.Tensor] = {}
    layer = task.trainable_module.bn1
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    task.trainable_module.conv1.register_forward_hook(lambda module, args, output: seen.update(joint=args[0]))
    result = task(torch.stack([images, -images], 1), labels)
    assert torch.equal(seen["joint"][:6], images)
    assert torch.equal(seen["joint"][6:12], -images)
    assert {"loss/clean", "loss/aug", "loss/adv"} < set(result)
    after = layer.state_dict()
    changed = [
        route
        for route in ("", "aux.aug.", "aux.adv.")
        if (after[f"{route}running_mean"] != before[f"{route}running_mean"]).any()
    ]
    assert changed == ["", "aux.aug.", "aux.adv."]


def test_fast_step_equals_the_published_one() -> None:
    """Three passes; gradients are averaged over the images that each parameter sees."""
    torch.manual_seed(0)
    attack = LinfPGD(AttackConfig(**dict[str, Any](RECIPES["fast"].attack)), HALF, HALF)
    task = AdvPropTask(timm.create_model("resnet10t", num_classes=5), RECIPES["fast"], attack).train()
    torch.manual_seed(3)
    images, labels = torch.rand(10, 3, 32, 32) * 2 - 1, torch.randint(0, 5, (10,))
    model = copy.deepcopy(task.trainable_module)
    torch.manual_seed(7)
    task(images, labels)["loss"].backward()

    torch.manual_seed(7)
    clean, few, few_labels = images[:8], images[8:], labels[8:]
    ball = task.attack.ball(few)
    noisy = task.attack.start(ball).requires_grad_(True)
    with frozen_statistics(model), route(model, "adv"):
        (nn.functional.cross_entropy(model(noisy), few_labels, reduction="sum") / 2).backward()
    assert noisy.grad is not None
    attacked = task.attack.step(ball, noisy.detach(), noisy.grad)
    assert (attacked - few).abs().max() <= 2 / 255 + 1e-6
    nn.functional.cross_entropy(model(clean), labels[:8], reduction="sum").backward()
    with route(model, "adv"):
        (nn.functional.cross_entropy(model(attacked), few_labels, reduction="sum") / 2).backward()
    norms = {
        parameter: module
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d)
        for parameter in module.parameters(recurse=False)
    }
    names = dict(model.named_parameters())
    for name, own in task.trainable_module.named_parameters():
        seen_images = 10 if names[name] not in norms else 2 if ".aux." in name else 8
        torch.testing.assert_close(own.grad, names[name].grad / seen_images, rtol=2e-3, atol=2e-5, msg=name)


def test_fast_updates_auxiliary_statistics_once_per_step() -> None:
    task = make_task("fast")
    with pytest.raises(ConfigError, match=r"adv gets 1 of 6 images.*larger --batch-size"):
        task(*batch())
    task = make_task("fast")
    task(torch.rand(10, 3, 32, 32), torch.randint(0, 5, (10,)))
    counts = {
        int(value) for key, value in task.trainable_module.state_dict().items() if key.endswith("num_batches_tracked")
    }
    assert counts == {1}


def test_mixup_changes_the_clean_branch_only() -> None:
    from timm.data import Mixup

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    mixup = Mixup(mixup_alpha=1.0, label_smoothing=0.0, num_classes=5)
    task = AdvPropTask(model, RECIPES["advprop"], ATTACK, mixup=mixup).train()
    images, labels = batch()
    np.random.seed(0)  # timm's mixup uses NumPy's generator
    original = images.clone()
    joint: list[torch.Tensor] = []
    model.conv1.register_forward_hook(lambda module, args, output: joint.append(args[0].detach()))
    task(images, labels)
    assert torch.equal(images, original)
    assert (joint[-1][:6] - images).abs().max() > 0.1
    assert (joint[-1][6:] - images).abs().max() <= 2 / 255 + 1e-6


@pytest.mark.parametrize(("recipe", "images"), [("fast", 9), ("advprop", 5)])
def test_mixup_of_an_odd_number_of_clean_images(recipe: str, images: int) -> None:
    """The recipe `fast` has 51 clean images at its default batch size."""
    from timm.data import Mixup

    torch.manual_seed(0)
    np.random.seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    mixup = Mixup(mixup_alpha=1.0, label_smoothing=0.1, num_classes=5)
    task = AdvPropTask(model, RECIPES[recipe], ATTACK, mixup=mixup).train()
    clean: list[torch.Tensor] = []
    model.conv1.register_forward_hook(lambda module, args, output: clean.append(args[0].detach()))
    batch_NCHW = torch.rand(images, 3, 32, 32)
    loss = task(batch_NCHW, torch.arange(images) % 5)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    odd = round(0.8 * images) if recipe == "fast" else images
    assert odd % 2 == 1
    assert not torch.equal(clean[-1][0], batch_NCHW[0])
    assert torch.equal(clean[-1][odd - 1], batch_NCHW[odd - 1])


def test_class_weights_also_apply_to_soft_labels() -> None:
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    model = timm.create_model("resnet10t", num_classes=5)
    task = AdvPropTask(model, RECIPES["vanilla"], ATTACK, criterion=nn.CrossEntropyLoss(weights))
    logits, labels = torch.rand(6, 5), torch.arange(6) % 5
    soft = nn.functional.one_hot(labels, 5).float()
    expected = nn.functional.cross_entropy(logits, labels, weights, reduction="sum") / 6
    torch.testing.assert_close(task.soft_criterion(logits, soft), expected)


def test_bf16_attack_and_step_run_under_autocast() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    task = AdvPropTask(model, RECIPES["advprop"], ATTACK, amp_dtype=torch.bfloat16).train()
    kinds: list[torch.dtype] = []
    model.fc.register_forward_hook(lambda module, args, output: kinds.append(output.dtype))
    result = task(*batch())
    assert kinds == [torch.bfloat16] * 2
    assert {value.dtype for value in result.values()} == {torch.float32}  # sums of bfloat16 losses would stop growing
    result["loss"].backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def fast_gradients(amp_dtype: torch.dtype | None, factor: float) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    task = AdvPropTask(model, RECIPES["fast"], ATTACK, amp_dtype=amp_dtype).train()
    torch.manual_seed(4)
    images, labels = torch.rand(80, 3, 32, 32) * 2 - 1, torch.randint(0, 5, (80,))
    (task(images, labels)["loss"] * factor).backward()
    return [parameter.grad / factor for parameter in model.parameters()]


def test_reused_gradient_is_proportional_to_the_loss() -> None:
    """GradScaler and gradient accumulation rely on it."""
    for scaled, plain in zip(fast_gradients(None, 64), fast_gradients(None, 1), strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-8)


def test_reused_gradient_in_float16() -> None:
    half, full = (torch.cat([g.flatten() for g in fast_gradients(kind, 1024)]) for kind in (torch.float16, None))
    assert torch.isfinite(half).all()
    assert nn.functional.cosine_similarity(half, full, dim=0) > 0.98


def test_routes_of_a_recipe_and_their_weights() -> None:
    fast = RECIPES["fast"]
    assert fast.auxiliary_routes == ("adv",)
    assert (fast.route_weight("main"), fast.route_weight("adv")) == (0.8, 0.2)
    assert RECIPES["fine-grained"].auxiliary_routes == ("aug", "adv")
    assert {name: recipe.views for name, recipe in RECIPES.items() if recipe.views > 1} == {"fine-grained": 2}
