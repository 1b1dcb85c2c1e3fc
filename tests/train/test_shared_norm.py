"""Routes that share their statistics, alone, in a training step, and in checkpoints and exports."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from export.config import ExportConfig
from export.pipeline import export_checkpoint
from runtime import load
from runtime.errors import ArchError, ConfigError
from runtime.spec import ModelSpec
from tests.support.algorithm1 import relative
from train.attack import LinfPGD, Randomness
from train.checkpoint import load_checkpoint
from train.config import AttackConfig, DataConfig, TrainConfig
from train.dual_bn import (
    add_auxiliary_bns,
    auxiliary_routes,
    frozen_statistics,
    route,
    select_route,
    shares_statistics,
    strip_auxiliary,
)
from train.loop import fit
from train.models import restore_model
from train.recipes import RECIPES
from train.task import AdvPropTask

HALF = (0.5, 0.5, 0.5)


class Fixed(Randomness):
    """Random numbers that do not depend on earlier calls."""

    def noise(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return torch.sin(images_NCHW * 12345.678)

    def chance(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return self.noise(images_NCHW.mean((1, 2, 3), keepdim=True)).abs()

    def shift(self, labels_N: torch.Tensor, classes: int) -> torch.Tensor:
        return labels_N % (classes - 1) + 1


def norm(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    layer: Any = (
        BatchNormAct2d(6, act_layer=nn.SiLU, **changes) if kind == "timm" else nn.BatchNorm2d(6, **changes)
    ).double()
    for tensor in (layer.weight, layer.bias, layer.running_mean):
        if tensor is not None:
            nn.init.normal_(tensor)
    return layer


def routed(layer: nn.Module) -> Any:
    """Return a network of one layer with a second set of affine parameters."""
    model: Any = add_auxiliary_bns(nn.Sequential(layer), ["adv"], share_statistics=True)
    for parameter in model[0].aux["adv"].parameters():
        nn.init.normal_(parameter)
    return model


def small_network() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5, drop_rate=0.0).double()
    for name, parameter in model.named_parameters():
        if "bn" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def task_of(recipe: str) -> AdvPropTask:
    attack = LinfPGD(AttackConfig(epsilon=2.0), HALF, HALF, Fixed())
    return AdvPropTask(small_network(), RECIPES[recipe], attack, criterion=nn.CrossEntropyLoss()).train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.rand(6, 3, 32, 32, dtype=torch.float64) * 2 - 1, torch.randint(0, 5, (6,))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("torch", {}),
        ("torch", {"momentum": None}),
        ("torch", {"track_running_stats": False}),
        ("torch", {"affine": False}),
        ("timm", {}),
        ("timm", {"track_running_stats": False}),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_one_route_is_the_layer_with_other_affine_parameters(
    kind: str, changes: dict[str, Any], training: bool
) -> None:
    plain = norm(kind, **changes)
    model = routed(copy.deepcopy(plain)).train(training)
    for name, parameter in model[0].aux["adv"].named_parameters():
        plain.get_parameter(name).data.copy_(parameter)
    plain.train(training)
    x = torch.randn(10, 6, 4, 4, dtype=torch.float64)
    for _ in range(2):
        with route(model, "adv"):
            torch.testing.assert_close(model(x), plain(x))
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(model[0].get_buffer(name), buffer)


@pytest.mark.parametrize("kind", ["torch", "timm"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_parts_are_normalized_together_and_scaled_separately(
    kind: str, training: bool, layout: torch.memory_format
) -> None:
    layer = norm(kind)
    plain = nn.BatchNorm2d(6, affine=False).double().train(training)
    plain.load_state_dict({name: value.clone() for name, value in layer.named_buffers()})
    model = routed(layer).train(training)
    x = torch.randn(10, 6, 4, 4, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_(True)
    with route(model, ("main", 7), ("adv", 3)):
        y = model(x)
    normalized = plain(x)
    parts = [
        part * affine.weight.view(1, -1, 1, 1) + affine.bias.view(1, -1, 1, 1)
        for part, affine in zip(normalized.split([7, 3]), (layer, layer.aux["adv"]), strict=True)
    ]
    z = nn.functional.silu(torch.cat(parts)) if kind == "timm" else torch.cat(parts)
    torch.testing.assert_close(y, z)
    assert y.is_contiguous(memory_format=layout)
    direction = torch.randn_like(y)
    gradients = [torch.autograd.grad(output, [x, *model.parameters()], direction) for output in (y, z)]
    torch.testing.assert_close(*gradients)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(layer.get_buffer(name), buffer)


def test_frozen_statistics_do_not_change_on_any_route() -> None:
    model = routed(norm("torch")).train()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(10, 6, 4, 4, dtype=torch.float64)
    with frozen_statistics(model), route(model, ("main", 7), ("adv", 3)):
        model(x)
    with frozen_statistics(model), route(model, "adv"):
        model(x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_result_has_the_data_type_of_the_input_under_autocast() -> None:
    model = routed(norm("torch").float()).float().train()
    x = torch.randn(10, 6, 4, 4)
    with route(model, ("main", 7), ("adv", 3)):
        exact, rounded = model(x), model(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)


def test_auxiliary_routes_store_affine_parameters_only() -> None:
    model = add_auxiliary_bns(small_network(), ["adv"], share_statistics=True)
    state = model.state_dict()
    auxiliary = {key.rpartition(".")[2] for key in state if ".aux." in key}
    assert auxiliary == {"weight", "bias"}
    assert auxiliary_routes(state) == ("adv",)
    assert shares_statistics(state)
    assert not shares_statistics(small_network().state_dict())
    assert not shares_statistics(add_auxiliary_bns(small_network(), ["adv"]).state_dict())
    small_network().load_state_dict(strip_auxiliary(state))


@pytest.mark.parametrize("name", ["main", "adv"])
def test_outputs_and_input_gradients_of_a_route_are_those_of_the_stock_model(name: str) -> None:
    model = add_auxiliary_bns(small_network(), ["adv"], share_statistics=True)
    for key, parameter in model.named_parameters():
        if ".aux." in key:
            nn.init.uniform_(parameter, 0.5, 1.5)
    model.train()(batch()[0])
    model.eval().requires_grad_(False)
    stock = small_network().eval()
    stock.load_state_dict(select_route(model.state_dict(), name))
    x = batch()[0].requires_grad_(True)
    with route(model, name):
        y = model(x)
        with torch.no_grad():
            torch.testing.assert_close(model(x), stock(x))
    torch.testing.assert_close(y, stock(x))
    direction = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, direction), torch.autograd.grad(stock(x), x, direction))


def test_the_first_step_is_that_of_one_shared_batchnorm_with_the_gradient_divided_between_two() -> None:
    """The two sets of affine parameters start equal, and only their gradients differ."""
    separate, shared = task_of("shared-statistics"), task_of("shared-bn")
    images, labels = batch()
    losses = [task(images, labels)["loss"] for task in (separate, shared)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in separate.trainable_module.named_parameters()}
    summed = {name: gradients[name].clone() for name in gradients if ".aux." not in name}
    for name, gradient in gradients.items():
        if ".aux." in name:
            summed[name.replace(".aux.adv.", ".")] += gradient
    expected = {name: parameter.grad for name, parameter in shared.trainable_module.named_parameters()}
    assert relative(summed, expected) < 1e-8
    buffers = [dict(task.trainable_module.named_buffers()) for task in (separate, shared)]
    assert relative(*buffers) < 1e-12


def test_a_step_equals_a_step_computed_without_routed_layers() -> None:
    """The reference normalizes the joint batch, and scales each half, in layers of its own."""

    class Halves(nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.layer = layer
            self.weights = nn.ParameterList([layer.weight.detach().clone(), layer.aux["adv"].weight.detach().clone()])
            self.biases = nn.ParameterList([layer.bias.detach().clone(), layer.aux["adv"].bias.detach().clone()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
            halves = ((x - mean) * torch.rsqrt(variance + self.layer.eps)).chunk(2)
            pairs = zip(halves, self.weights, self.biases, strict=True)
            return torch.cat([half * weight.view(-1, 1, 1) + bias.view(-1, 1, 1) for half, weight, bias in pairs])

    task = task_of("shared-statistics")
    for name, parameter in task.trainable_module.named_parameters():
        if ".aux." in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    reference = copy.deepcopy(task.trainable_module)
    layers = {name: layer for name, layer in reference.named_modules() if hasattr(layer, "aux")}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(reference.get_submodule(parent), child, Halves(layer))
    images, labels = batch()
    attacked = task.attack(copy.deepcopy(task.trainable_module), images, labels, "adv")
    logits = reference(torch.cat([images, attacked])).chunk(2)
    torch.stack([nn.functional.cross_entropy(half, labels) for half in logits]).sum().backward()
    task(images, labels)["loss"].backward()
    found = {name: parameter.grad for name, parameter in task.trainable_module.named_parameters()}
    expected = {}
    for name in found:
        layer, _, key = name.replace(".aux.adv.", ".").rpartition(".")
        if layer in layers:
            halves = reference.get_submodule(layer).get_submodule("weights" if key == "weight" else "biases")
            expected[name] = halves.get_parameter("1" if ".aux." in name else "0").grad
        else:
            expected[name] = reference.get_parameter(name).grad
    assert relative(found, expected) < 1e-8


def test_a_batchnorm_with_its_own_forward_method_cannot_share_statistics() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model = nn.Sequential(nn.BatchNorm2d(3), Doubled(3))
    with pytest.raises(ArchError, match=r"^Doubled cannot share its statistics between routes"):
        add_auxiliary_bns(model, ["adv"], share_statistics=True)
    assert type(model[0]) is nn.BatchNorm2d


@pytest.mark.parametrize(("recipe", "shared"), [("advprop", True), ("shared-statistics", False)])
def test_a_model_with_the_other_kind_of_routes_is_refused(recipe: str, shared: bool) -> None:
    model = add_auxiliary_bns(small_network(), ["adv"], share_statistics=shared)
    found = "share their statistics" if shared else "have separate statistics"
    with pytest.raises(ConfigError, match=rf"^the routes of the model {found}, but the recipe needs routes that"):
        AdvPropTask(model, RECIPES[recipe], LinfPGD(AttackConfig(), HALF, HALF))


@pytest.mark.slow
def test_a_run_is_restored_and_exported_on_every_route(tmp_path: Path) -> None:
    config = TrainConfig(
        arch="test_resnet",
        recipe="shared-statistics",
        epochs=1,
        batch_size=64,
        out=tmp_path,
        device="cpu",
        tensorboard=False,
        eval_attack_images=16,
        data=DataConfig(img_size=32, workers=0),
    )
    last = fit(config).last
    content = load_checkpoint(last)
    whole = restore_model(content, last, routes=True).eval()
    assert shares_statistics(whole.state_dict())
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in _normalization(content, last))
    images = (content["sample"]["images"].permute(0, 3, 1, 2).float() / 255 - mean) / std
    outputs = []
    for name in ("main", "adv"):
        with torch.no_grad(), route(whole, name):
            outputs.append(whole(images))
            torch.testing.assert_close(restore_model(content, last, bn=name).eval()(images), outputs[-1])
        exported = export_checkpoint(last, ExportConfig(out=tmp_path / name, route=name)).onnx
        logits = load(exported, device="cpu").run(images.numpy())
        torch.testing.assert_close(torch.from_numpy(logits), outputs[-1], rtol=1e-3, atol=1e-4)
    assert not torch.equal(*outputs)


def _normalization(content: dict[str, Any], path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    spec = ModelSpec.from_json(content["spec"], where=str(path)).preprocessing
    return spec.mean, spec.std
