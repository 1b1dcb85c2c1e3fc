import pytest
import timm
import torch

from runtime.errors import ArchError
from train.dual_bn import add_auxiliary_bns
from train.freezing import Backbone


def step(model: torch.nn.Module, backbone: Backbone) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.rand(4, 3, 32, 32)).sum().backward()
    backbone.drop_gradients()
    optimizer.step()


def test_a_frozen_backbone_keeps_weights_and_statistics_and_is_released() -> None:
    torch.manual_seed(0)
    model = add_auxiliary_bns(timm.create_model("test_resnet", num_classes=3), ("adv",))
    backbone = Backbone(model, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    backbone.start_epoch(0)
    model.train()
    backbone.start_epoch(0)
    step(model, backbone)
    after = model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"fc.weight", "fc.bias"}
    model.train()
    backbone.start_epoch(1)
    step(model, backbone)
    assert not torch.equal(before["conv1.0.weight"], model.state_dict()["conv1.0.weight"])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_network_of_unknown_classifier_cannot_be_frozen() -> None:
    with pytest.raises(ArchError, match="does not name the classifier of Sequential; remove --freeze-backbone"):
        Backbone(torch.nn.Sequential(torch.nn.Linear(2, 2)), 1)
    Backbone(torch.nn.Sequential(torch.nn.Linear(2, 2)), 0).start_epoch(0)
