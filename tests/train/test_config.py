import tomllib
from pathlib import Path

import pytest
import timm
import torch

from runtime.errors import ConfigError
from train.attack import LinfPGD
from train.build import make_model, make_task
from train.config import AttackConfig, DataConfig, OptimConfig, TrainConfig
from train.config_file import from_mapping, merge, parse_setting, read_toml, to_mapping, to_toml
from train.presets import PAPER, paper
from train.recipes import RECIPES


def test_toml_round_trip(tmp_path: Path) -> None:
    config = TrainConfig(
        arch="resnet18",
        out=tmp_path / 'a "quoted" name',
        attack=AttackConfig(epsilon=4, steps=3),
        data=DataConfig(root=tmp_path, crop_scale=(0.1, 1.0)),
        optim=OptimConfig(options={"alpha": 0.9}),
    )
    (tmp_path / "c.toml").write_text(to_toml(config))
    assert from_mapping(read_toml(tmp_path / "c.toml")) == config


def test_toml_of_earlier_versions(tmp_path: Path) -> None:
    """Earlier versions wrote dicts inline and arrays on one line."""
    (tmp_path / "c.toml").write_text(
        'arch = "resnet18"\nout = "/runs/é"\n\n[data]\ncrop_scale = [0.1, 1.0]\n\n[optim]\noptions = {alpha = 0.9}\n',
        "utf-8",
    )
    config = from_mapping(read_toml(tmp_path / "c.toml"))
    assert config.data.crop_scale == (0.1, 1.0)
    assert config.optim.options == {"alpha": 0.9}
    assert from_mapping(tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim.weight_decay=1e-5", {"optim": {"weight_decay": 1e-5}}),
        ("arch=resnet18", {"arch": "resnet18"}),
        ("compile=true", {"compile": True}),
        ("optim.options.alpha=0.9", {"optim": {"options": {"alpha": 0.9}}}),
        ("data.crop_scale=[0.2, 1.0]", {"data": {"crop_scale": [0.2, 1.0]}}),
    ],
)
def test_settings_on_the_command_line(text: str, expected: dict[str, object]) -> None:
    assert parse_setting(text) == expected


def test_later_settings_replace_earlier_ones_field_by_field() -> None:
    merged = merge({"arch": "a", "optim": {"lr": 1, "ema_decay": 0.9}}, {"optim": {"lr": 2}})
    assert merged == {"arch": "a", "optim": {"lr": 2, "ema_decay": 0.9}}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, "the architecture is missing: pass --arch NAME"),
        ({"arch": "a", "epoch": 3}, "unknown setting epoch; did you mean epochs"),
        ({"arch": "a", "optim": {"learning": 3}}, "unknown setting optim.learning"),
        ({"arch": "a", "lr": 3}, "unknown setting lr; use optim.lr"),
        ({"arch": "a", "learning_rate": 3}, "unknown setting learning_rate; use optim.lr"),
        ({"arch": "a", "data": {"weight_decay": 3}}, "unknown setting data.weight_decay; use optim.weight_decay"),
        ({"arch": "a", "workres": 3}, r"unknown setting workres; did you mean data\.workers"),
        (
            {"arch": "a", "optim": {"warmup_epoch": 3}},
            r"unknown setting optim\.warmup_epoch; did you mean optim\.warmup",
        ),
        ({"arch": "a", "epochs": "three"}, "epochs must be a whole number from 1 to 1000000; found 'three'; remove"),
        ({"arch": "a", "epochs": True}, "epochs must be a whole number from 1 to .*; found True"),
        ({"arch": "a", "optim": 3}, "optim is a section"),
        ({"arch": "a", "amp": "fp8"}, "amp must be none, bf16 or fp16"),
    ],
)
def test_invalid_settings_are_refused(content: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        from_mapping(content)


def test_invalid_settings_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("arch = resnet18")
    with pytest.raises(ConfigError, match=r"bad\.toml is not TOML.*line 1"):
        read_toml(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match="cannot read --config"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="--set takes FIELD=VALUE"):
        parse_setting("epochs")


def test_a_recipe_sets_the_attack_unless_the_user_does() -> None:
    fast = RECIPES["fast"]
    assert TrainConfig(arch="a").resolved_attack(fast).targeted is False
    explicit = TrainConfig(arch="a", attack=AttackConfig(epsilon=2.0)).resolved_attack(fast)
    assert (explicit.epsilon, explicit.resolved_steps) == (2.0, 1)
    assert TrainConfig(arch="a").resolved_attack(RECIPES["advprop"]) == AttackConfig()


def test_finetune_needs_a_checkpoint() -> None:
    with pytest.raises(ConfigError, match=r"starts from another run; add --weights runs/NAME/best\.pt"):
        make_model(TrainConfig(arch="resnet10t", recipe="finetune"), RECIPES["finetune"], "ab")


def test_two_sources_of_weights_are_refused() -> None:
    config = TrainConfig(arch="resnet10t", pretrained=True, init_checkpoint=Path("a.pt"))
    with pytest.raises(ConfigError, match=r"found --pretrained and --weights a\.pt; expected one source"):
        make_model(config, RECIPES["vanilla"], "ab")


def test_weights_lower_the_default_learning_rate() -> None:
    assert TrainConfig(arch="a").resolved_lr == 3e-3
    assert TrainConfig(arch="a", pretrained=True).resolved_lr == 5e-4
    assert TrainConfig(arch="a", init_checkpoint=Path("a.pt")).resolved_lr == 5e-4
    assert TrainConfig(arch="a", init_checkpoint=Path("a.pt"), optim=OptimConfig(lr=0.1)).resolved_lr == 0.1


@pytest.mark.parametrize(
    ("images", "explicit", "expected"),
    [
        *((None, None, 64), (10_000, None, 64), (512, None, 64), (511, None, 32), (160, None, 16), (9, None, 8)),
        *((5, None, 5), (1, None, 2), (100, 256, 100), (1000, 256, 256)),
    ],
)
def test_the_batch_size_follows_the_number_of_images(images: int | None, explicit: int | None, expected: int) -> None:
    config = TrainConfig(arch="a", batch_size=explicit, data=DataConfig(root=Path("photos")))
    assert config.resolved_batch_size(224, images) == expected


def test_paths_are_written_as_absolute_paths(tmp_path: Path) -> None:
    """A relative path in config.toml would not repeat the run from another folder."""
    config = TrainConfig(arch="a", out=Path("run"), init_checkpoint=Path("../a.pt"), data=DataConfig(root=Path("data")))
    (tmp_path / "c.toml").write_text(to_toml(config))
    again = from_mapping(read_toml(tmp_path / "c.toml"))
    assert (again.out, again.data.root) == (Path.cwd() / "run", Path.cwd() / "data")
    assert again.init_checkpoint == Path.cwd() / "../a.pt"


def test_an_architecture_without_a_preset() -> None:
    with pytest.raises(ConfigError, match="--preset paper has no settings for 'resnet18'"):
        paper("resnet18", 256)


def test_published_settings() -> None:
    b3 = paper("tf_efficientnet_b3.ap_in1k", 2048)
    assert b3["data"]["img_size"] == 300
    assert b3["optim"]["lr"] == pytest.approx(0.128)
    assert (b3["drop"], b3["drop_path"], b3["bn_momentum"]) == (0.3, 0.2, 0.01)
    assert len(PAPER) == 13


@pytest.mark.slow
@pytest.mark.parametrize("arch", PAPER)
def test_a_training_step_of_every_preset(arch: str) -> None:
    content = merge(paper(arch, 2), {"arch": arch, "optim": {"warmup_epochs": 0.0}})
    config = from_mapping(content)
    torch.manual_seed(0)
    recipe = RECIPES["advprop"]
    model = make_model(config, recipe, "abcd")
    momenta = {layer.momentum for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)}
    assert momenta == {config.bn_momentum or 0.1}
    # One attack step for every preset: this tests the network, not the attack.
    attack = LinfPGD(AttackConfig(), (0.5,) * 3, (0.5,) * 3)
    task = make_task(config, recipe, model, attack, 4, torch.device("cpu")).train()
    optimizer = timm.optim.create_optimizer_v2(
        model, opt=config.optim.optimizer, lr=config.optim.lr, **config.optim.options
    )
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss = task(torch.rand(4, 3, 32, 32), torch.tensor([0, 3, 1, 2]))["loss"]
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    # Every parameter has a gradient. It may be 0 in zero-initialized residual branches.
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert changed[0]
    assert changed[-1]
    assert to_mapping(config)["attack"]["epsilon"] >= 1
