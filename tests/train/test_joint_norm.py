import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from train.dual_bn import add_auxiliary_bns, route
from train.joint_norm import affine_map, applies, is_constant, is_plain, normalise_parts


def layer(kind: str, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    made = BatchNormAct2d(6, act_layer=nn.SiLU, **changes) if kind == "timm" else nn.BatchNorm2d(6, **changes)
    for tensor in (made.weight, made.bias, made.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(made.running_var, 0.5, 2)
    return made


def images(memory_format: torch.memory_format = torch.channels_last) -> torch.Tensor:
    return torch.randn(10, 6, 5, 5).to(memory_format=memory_format).requires_grad_(True)


@pytest.mark.parametrize("kind", ["torch", "timm"])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_parts_are_normalised_as_the_layers_do_it(kind: str, memory_format: torch.memory_format) -> None:
    layers = [layer(kind), layer(kind)]
    nn.init.normal_(layers[1].weight)
    others = copy.deepcopy(layers)
    x = images(memory_format)
    assert applies(layers, x)
    y = normalise_parts(layers, [7, 3], x)
    direction = torch.randn_like(y)
    gradients = torch.autograd.grad(y, [x, layers[0].weight, layers[1].weight, layers[1].bias], direction)
    z = torch.cat([others[0](x[:7]), others[1](x[7:])])
    expected = torch.autograd.grad(z, [x, others[0].weight, others[1].weight, others[1].bias], direction)
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(gradients, expected)
    assert y.is_contiguous(memory_format=memory_format)
    for mine, other in zip(layers, others, strict=True):
        torch.testing.assert_close(mine.state_dict(), other.state_dict())
        assert mine.num_batches_tracked == 1


@pytest.mark.parametrize("kind", ["torch", "timm"])
def test_an_attack_sees_the_same_layer_as_an_affine_map(kind: str) -> None:
    norm = layer(kind).eval().requires_grad_(False)
    x = images()
    assert is_constant(norm, x)
    y, expected = affine_map(norm, x), norm(x)
    direction = torch.randn_like(y)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, x, direction), torch.autograd.grad(expected, x, direction), rtol=1e-5, atol=1e-6
    )


def test_where_the_layers_themselves_are_used() -> None:
    norm, x = layer("torch"), images()
    assert not applies([layer("torch", momentum=None)], x)
    assert not applies([layer("torch").eval()], x)
    assert not applies([norm], x.to(torch.bfloat16))
    assert not is_constant(norm.eval(), x)  # its own gradient is wanted
    norm.requires_grad_(False)
    assert is_constant(norm, x)
    with torch.no_grad():
        assert not is_constant(norm, x)  # inference stays bit-equal to the stock model
    norm.register_forward_hook(lambda *_: None)
    assert not is_constant(norm, x)

    class Other(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    assert is_plain(nn.BatchNorm2d)
    assert is_plain(BatchNormAct2d)
    assert not is_plain(Other)


def test_a_layer_with_a_forward_of_its_own_keeps_it() -> None:
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
