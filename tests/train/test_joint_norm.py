import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from train.dual_bn import add_auxiliary_bns, route
from train.joint_norm import affine_map, can_normalize_parts, can_use_affine_map, is_plain, normalize_parts


def layer(kind: str, **changes: Any) -> nn.BatchNorm2d:
    torch.manual_seed(0)
    made: nn.BatchNorm2d = (
        BatchNormAct2d(6, act_layer=nn.SiLU, **changes) if kind == "timm" else nn.BatchNorm2d(6, **changes)
    )
    assert isinstance(made.running_mean, torch.Tensor) and isinstance(made.running_var, torch.Tensor)
    for tensor in (made.weight, made.bias, made.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(made.running_var, 0.5, 2)
    return made


def images(memory_format: torch.memory_format = torch.channels_last) -> torch.Tensor:
    return torch.randn(10, 6, 5, 5).to(memory_format=memory_format).requires_grad_(True)


@pytest.mark.parametrize("kind", ["torch", "timm"])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_parts_are_normalized_like_the_layers_do(kind: str, memory_format: torch.memory_format) -> None:
    layers = [layer(kind), layer(kind)]
    nn.init.normal_(layers[1].weight)
    others = copy.deepcopy(layers)
    x = images(memory_format)
    assert can_normalize_parts(layers, [7, 3], x)
    y = normalize_parts(layers, [7, 3], x)
    direction = torch.randn_like(y)
    gradients = torch.autograd.grad(y, [x, layers[0].weight, layers[1].weight, layers[1].bias], direction)
    z = torch.cat([others[0](x[:7]), others[1](x[7:])])
    expected = torch.autograd.grad(z, [x, others[0].weight, others[1].weight, others[1].bias], direction)
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(gradients, expected)
    assert y.is_contiguous(memory_format=memory_format)
    for own, other in zip(layers, others, strict=True):
        torch.testing.assert_close(own.state_dict(), other.state_dict())
        assert own.num_batches_tracked == 1


def dense() -> torch.Tensor:
    return torch.randn(10, 6, 5, 4)


INPUTS: dict[str, Callable[[], torch.Tensor]] = {
    "contiguous": dense,
    "channels-last": lambda: dense().to(memory_format=torch.channels_last),
    "slice of channels": lambda: torch.randn(10, 9, 5, 4)[:, 2:8],
    "slice of channels, channels-last": lambda: torch.randn(10, 9, 5, 4).to(memory_format=torch.channels_last)[:, 2:8],
    "every second pixel": lambda: torch.randn(10, 6, 10, 4)[:, :, ::2],
    "transposed image": lambda: torch.randn(10, 6, 4, 5).transpose(2, 3),
    "images last": lambda: torch.randn(6, 5, 4, 10).permute(3, 0, 1, 2),
    "repeated image": lambda: torch.randn(1, 6, 5, 4).expand(10, -1, -1, -1),
    "tokens": lambda: torch.randn(10, 7, 6).transpose(1, 2),
    "slice of features": lambda: torch.randn(10, 9)[:, 2:8],
    "one pixel": lambda: torch.randn(10, 6, 1, 1),
    "volume, channels-last": lambda: torch.randn(10, 6, 3, 4, 5).to(memory_format=torch.channels_last_3d),
    "slice of a volume": lambda: torch.randn(10, 6, 3, 4, 5)[..., 1:4],
}


@pytest.mark.parametrize("case", INPUTS)
@pytest.mark.parametrize("spread_gradient", [False, True])
def test_a_joint_forward_equals_separate_ones_for_every_input_layout(case: str, spread_gradient: bool) -> None:
    """NextViT and lambda layers pass slices of channels, for which torch's kernel is wrong."""
    torch.manual_seed(0)
    x = INPUTS[case]()
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[x.ndim]
    joint = add_auxiliary_bns(nn.Sequential(kind(6)), ["adv"]).train()
    for tensor in joint.parameters():
        nn.init.normal_(tensor)
    separate = copy.deepcopy(joint)
    x.requires_grad_(True)
    with route(joint, ("main", 7), ("adv", 3)):
        y = joint(x)
    with route(separate, "main"):
        main = separate(x[:7])
    with route(separate, "adv"):
        adv = separate(x[7:])
    z = torch.cat([main, adv])
    direction = torch.randn(10, *[1] * (y.ndim - 1)).expand_as(y) if spread_gradient else torch.randn_like(y)
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(
        torch.autograd.grad(y, [x, *joint.parameters()], direction),
        torch.autograd.grad(z, [x, *separate.parameters()], direction),
    )
    torch.testing.assert_close(joint.state_dict(), separate.state_dict())


def test_a_part_of_one_value_is_an_error_like_in_the_layer() -> None:
    joint = add_auxiliary_bns(nn.Sequential(nn.BatchNorm2d(6)), ["adv"]).train()
    with route(joint, ("main", 3), ("adv", 1)), pytest.raises(ValueError, match="more than 1 value per channel"):
        joint(torch.randn(4, 6, 1, 1))


def test_a_second_derivative_is_an_error() -> None:
    x = images()
    y = normalize_parts([layer("torch"), layer("torch")], [7, 3], x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("kind", ["torch", "timm"])
def test_affine_map_equals_the_layer_in_evaluation_mode(kind: str) -> None:
    norm = layer(kind).eval().requires_grad_(False)
    x = images()
    assert can_use_affine_map(norm, x)
    y, expected = affine_map(norm, x), norm(x)
    direction = torch.randn_like(y)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, x, direction), torch.autograd.grad(expected, x, direction), rtol=1e-5, atol=1e-6
    )


def test_conditions_of_the_fast_paths() -> None:
    norm, x = layer("torch"), images()
    assert can_normalize_parts([norm], [10], x)
    assert not can_normalize_parts([layer("torch", momentum=None)], [10], x)
    assert not can_normalize_parts([layer("torch").eval()], [10], x)
    assert not can_normalize_parts([norm], [10], x.to(torch.bfloat16))
    assert not can_normalize_parts([norm.double()], [10], x)
    norm.float()
    assert not can_use_affine_map(norm.eval(), x)  # the layer's parameters need a gradient
    norm.requires_grad_(False)
    assert can_use_affine_map(norm, x)
    with torch.no_grad():
        assert not can_use_affine_map(norm, x)  # inference stays bit-equal to the stock model
    norm.register_forward_hook(lambda *_: None)
    assert not can_use_affine_map(norm, x)

    class Other(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    assert is_plain(nn.BatchNorm2d)
    assert is_plain(BatchNormAct2d)
    assert not is_plain(Other)


def test_a_layer_with_another_forward_is_not_replaced() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    norm = Doubled(6)
    plain = copy.deepcopy(norm)
    model = add_auxiliary_bns(nn.Sequential(norm), ["adv"]).train()
    x = images()
    with route(model, ("main", 7), ("adv", 3)):
        y = model(x)
    torch.testing.assert_close(y[:7], plain(x[:7]))
