import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from runtime.errors import ArchError, ConfigError
from train.dual_bn import (
    RoutedBatchNorm,
    add_auxiliary_bns,
    auxiliary_routes,
    find_router,
    frozen_statistics,
    route,
    select_route,
    strip_auxiliary,
)


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


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4, affine=False))


def trained_network() -> nn.Module:
    """Build a network whose routes `adv` and `aug` have parameters and statistics of their own."""
    model = add_auxiliary_bns(small_network(), ["adv", "aug"]).train()
    for tensor in model.parameters():
        nn.init.normal_(tensor)
    for number, name in enumerate(("main", "adv", "aug")):
        with route(model, name):
            model(torch.randn(8, 3, 4, 4) + number)
    return model.eval()


@pytest.mark.parametrize("name", ["main", "adv", "aug"])
def test_a_selected_route_loads_into_the_stock_model_and_has_the_same_output(name: str) -> None:
    model, stock, x = trained_network(), small_network().eval(), torch.randn(2, 3, 4, 4)
    stock.load_state_dict(select_route(model.state_dict(), name), strict=True)
    with route(model, name):
        torch.testing.assert_close(model(x), stock(x), rtol=0, atol=0)


def test_routes_are_listed_in_the_order_of_the_state_dict() -> None:
    state = trained_network().state_dict()
    assert auxiliary_routes(state) == ("adv", "aug")
    assert auxiliary_routes(strip_auxiliary(state)) == ()
    with pytest.raises(ConfigError, match=r"^no BatchNorm route 'noise'; available: main, adv, aug$"):
        select_route(state, "noise")


@pytest.mark.parametrize(("key", "name"), [("bn1.aux_bn.0.weight", "aux_bn.0"), ("bn1.aux_bn.weight", "aux_bn")])
def test_split_batch_norms_of_timm_and_others_are_routes(key: str, name: str) -> None:
    state = {"bn1.weight": 1, key: 2, "aux.weight": 3, "head.aux_bn_size": 4}
    assert auxiliary_routes(state) == (name,)
    assert strip_auxiliary(state) == {"bn1.weight": 1, "aux.weight": 3, "head.aux_bn_size": 4}
    assert select_route(state, name) == {"bn1.weight": 2, "aux.weight": 3, "head.aux_bn_size": 4}


def test_frozen_statistics_are_not_updated_but_batches_are_still_normalized_by_their_own() -> None:
    model: Any = add_auxiliary_bns(small_network(), ["adv"]).train()
    model.append(nn.BatchNorm2d(4, track_running_stats=False))
    twin, x = copy.deepcopy(model), torch.randn(8, 3, 4, 4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError), frozen_statistics(model):
        torch.testing.assert_close(model(x), twin(x))
        raise ZeroDivisionError
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model(x)
    assert model[1].num_batches_tracked == 1
    assert [layer.track_running_stats for layer in (model[1], model[1].aux["adv"], model[4])] == [True, True, False]


def test_a_model_without_auxiliary_layers_has_the_main_route_only() -> None:
    model: Any = small_network()
    assert find_router(model) is None
    with route(model, "main"):
        assert model(torch.randn(2, 3, 4, 4)).shape == (2, 4, 4, 4)


def test_an_unknown_route_is_reported_with_the_known_ones() -> None:
    model = trained_network()
    message = "^the model has no BatchNorm route 'noise'; it has main, adv, aug$"
    with pytest.raises(ConfigError, match=message), route(model, ("main", 1), ("noise", 1)):
        pass
    router = find_router(model)
    assert router
    assert router.plan == (("main", 1),)


def test_counts_are_scaled_if_a_layer_folds_other_dimensions_into_the_first() -> None:
    model: Any = add_auxiliary_bns(nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(6)), ["adv"]).train()
    twin, x = copy.deepcopy(model), torch.randn(5, 4, 6)
    with route(model, ("main", 2), ("adv", 3)):
        joint = model(x)
    with route(twin, "adv"):
        adv = twin(x[2:])
    torch.testing.assert_close(joint, torch.cat([twin(x[:2]), adv]))
    with route(model, ("main", 2), ("adv", 3)), pytest.raises(ValueError, match="a batch of 24 cannot be routed as"):
        model(torch.randn(6, 4, 6))


def test_auxiliary_layers_cannot_be_added_twice() -> None:
    model = trained_network()
    with pytest.raises(ConfigError, match=r"^the model already has auxiliary BatchNorms$"):
        add_auxiliary_bns(model, ["other"])
    router = find_router(model)
    assert router
    assert router.auxiliary == ("adv", "aug")


def test_auxiliary_layers_start_as_copies_that_share_nothing() -> None:
    model: Any = small_network()
    nn.init.normal_(model[1].weight)
    add_auxiliary_bns(model, ["adv", "aug"])
    layers = [model[1], model[1].aux["adv"], model[1].aux["aug"]]
    assert all(torch.equal(layer.weight, model[1].weight) for layer in layers)
    assert len({layer.weight.data_ptr() for layer in layers}) == 3
    assert len({layer.running_mean.data_ptr() for layer in layers}) == 3


def test_the_layers_of_a_class_stay_of_one_class_with_a_telling_name() -> None:
    model: Any = add_auxiliary_bns(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm1d(3)), ["adv"])
    assert [type(layer).__name__ for layer in model] == ["RoutedBatchNorm2d", "RoutedBatchNorm2d", "RoutedBatchNorm1d"]
    assert type(model[0]) is type(model[1])
    assert isinstance(model[0], nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ([nn.Linear(3, 3)], "no normalization layer"),
        ([nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.LayerNorm(3)], "2 LayerNorm, 1 GroupNorm"),
    ],
)
def test_a_network_without_batch_norm_is_named_with_all_its_norms(layers: list[nn.Module], found: str) -> None:
    with pytest.raises(ArchError, match=f"^Sequential has no BatchNorm: it has {found}. AdvProp needs"):
        add_auxiliary_bns(nn.Sequential(*layers), ["adv"])


def test_a_joint_forward_in_evaluation_mode_uses_the_running_statistics_of_each_route() -> None:
    model, x = trained_network(), torch.randn(5, 3, 4, 4)
    separate = []
    for name, part in (("aug", x[:2]), ("main", x[2:])):
        with route(model, name):
            separate.append(model(part))
    with route(model, ("aug", 2), ("main", 3)):
        torch.testing.assert_close(model(x), torch.cat(separate))


@pytest.mark.parametrize("factor", [1, 2])
def test_subclasses_of_batch_norm_keep_their_own_forward(factor: int) -> None:
    class Own(nn.BatchNorm2d):
        pass

    class Scaled(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * factor

    norm = Own(3) if factor == 1 else Scaled(3)
    plain = nn.BatchNorm2d(3)
    model: Any = add_auxiliary_bns(nn.Sequential(norm), ["adv"]).train()
    x = torch.randn(6, 3, 4, 4)
    with route(model, ("main", 4), ("adv", 2)):
        torch.testing.assert_close(model(x), factor * torch.cat([plain(x[:4]), plain(x[4:])]))
    with route(model, "adv"):
        torch.testing.assert_close(model(x), factor * plain(x))


@pytest.mark.parametrize("name", ["main", "adv"])
def test_input_gradients_of_a_frozen_network_equal_those_of_the_stock_model(name: str) -> None:
    """An attack needs only these; BatchNorm on running statistics takes a shorter path then."""
    model, stock = trained_network().requires_grad_(False), small_network().eval()
    stock.load_state_dict(select_route(model.state_dict(), name))
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with route(model, name):
        y = model(x)
    torch.testing.assert_close(y, stock(x))
    direction = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, direction), torch.autograd.grad(stock(x), x, direction))


def test_an_invalid_route_name_is_reported() -> None:
    with pytest.raises(ConfigError, match=r"must be an identifier other than 'main'; found 'a\.b'"):
        add_auxiliary_bns(small_network(), ["adv", "a.b"])
