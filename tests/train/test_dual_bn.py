import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from runtime.errors import ArchError, ConfigError
from train.dual_bn import RoutedBatchNorm, add_auxiliary_bns, find_router, route, strip_auxiliary


def model_and_images(arch: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    return timm.create_model(arch, num_classes=5), torch.randn(6, 3, 32, 32)


def batch_norms(model: nn.Module, of: str) -> dict[str, torch.Tensor]:
    """Return the running statistics of the main or the auxiliary layers."""
    running = {key: value.clone() for key, value in model.state_dict().items() if "running" in key or "batches" in key}
    return {key: value for key, value in running.items() if (".aux." in key) == (of == "aux")}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("arch", ["efficientnet_b0", "mobilenetv3_small_050", "resnet10t", "densenet121"])
@pytest.mark.parametrize("training", [False, True])
def test_main_route_is_bit_equal_to_the_unconverted_model(arch: str, training: bool) -> None:
    plain, images = model_and_images(arch)
    routed = add_auxiliary_bns(copy.deepcopy(plain), ["adv"])
    plain.train(training)
    routed.train(training)
    outputs = []
    for model in (plain, routed):
        torch.manual_seed(1)  # dropout and stochastic depth
        outputs.append(model(images))
    assert torch.equal(*outputs)
    stripped = strip_auxiliary(routed.state_dict())
    assert all(torch.equal(value, stripped[key]) for key, value in plain.state_dict().items())


def test_batch_norm_act_has_its_activation_on_every_route() -> None:
    model, _ = model_and_images("efficientnet_b0")
    before = {name: type(module.act) for name, module in model.named_modules() if isinstance(module, BatchNormAct2d)}
    add_auxiliary_bns(model, ["adv"])
    assert nn.SiLU in before.values()
    for name, activation in before.items():
        layer: Any = model.get_submodule(name)
        assert type(layer.act) is activation
        assert type(layer.aux["adv"].act) is activation


def test_stripped_state_dict_loads_into_the_stock_model() -> None:
    model, _ = model_and_images("efficientnet_b0")
    add_auxiliary_bns(model, ["adv", "aug"])
    assert any(".aux.aug." in key for key in model.state_dict())
    timm.create_model("efficientnet_b0", num_classes=5).load_state_dict(
        strip_auxiliary(model.state_dict()), strict=True
    )


def test_each_route_updates_its_own_statistics_only() -> None:
    model, images = model_and_images("resnet10t")
    add_auxiliary_bns(model, ["adv"]).train()
    main, aux = batch_norms(model, "main"), batch_norms(model, "aux")
    with route(model, "adv"):
        model(images)
    assert not changed(main, batch_norms(model, "main"))
    assert changed(aux, batch_norms(model, "aux"))
    aux = batch_norms(model, "aux")
    model(images)
    assert changed(main, batch_norms(model, "main"))
    assert not changed(aux, batch_norms(model, "aux"))


def test_joint_forward_equals_separate_forwards() -> None:
    model, images = model_and_images("resnet10t")
    add_auxiliary_bns(model, ["adv"]).train()
    twin = copy.deepcopy(model)
    with route(model, ("main", 2), ("adv", 4)):
        joint = model(images)
    main = twin(images[:2])
    with route(twin, "adv"):
        adv = twin(images[2:])
    torch.testing.assert_close(joint, torch.cat([main, adv]), rtol=1e-4, atol=1e-5)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[key], rtol=1e-4, atol=1e-5)


def test_a_copied_model_has_its_own_router() -> None:
    model, _ = model_and_images("resnet10t")
    twin = copy.deepcopy(add_auxiliary_bns(model, ["adv"]))
    routers = {id(layer.router) for layer in twin.modules() if isinstance(layer, RoutedBatchNorm)}
    assert routers == {id(find_router(twin))}
    assert find_router(twin) is not find_router(model)


def test_route_is_restored_after_an_error() -> None:
    model, images = model_and_images("resnet10t")
    add_auxiliary_bns(model, ["adv"])
    with pytest.raises(RuntimeError), route(model, "adv"):
        model(images[:, :2])
    router = find_router(model)
    assert router is not None
    assert router.plan == (("main", 1),)


def test_architecture_without_batch_norm_is_reported_with_its_norms() -> None:
    model = timm.create_model("convnext_atto", num_classes=5)
    with pytest.raises(ArchError, match=r"convnext_atto has no BatchNorm: it has \d+ LayerNorm.*--recipe vanilla"):
        add_auxiliary_bns(model, ["adv"])


@pytest.mark.parametrize("name", ["main", "a.b", ""])
def test_invalid_route_names(name: str) -> None:
    model, _ = model_and_images("resnet10t")
    with pytest.raises(ConfigError):
        add_auxiliary_bns(model, [name])


def test_unknown_route() -> None:
    model, images = model_and_images("resnet10t")
    with pytest.raises(ConfigError, match="no BatchNorm route 'adv'; it has main"), route(model, "adv"):
        model(images)
