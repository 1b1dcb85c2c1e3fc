"""The joint training step equals separate steps, on networks chosen for their differences."""

import pytest
import torch

from tests.support.algorithm1 import FLOAT32, Networks, compare_steps
from tests.support.batch_norm_networks import image_size
from train.dual_bn import RoutedBatchNorm

LAYOUTS = (torch.contiguous_format, torch.channels_last)

NETWORKS = {
    "densenet121": "BatchNorms of concatenated channels",
    "dla46x_c": "trees of grouped convolutions",
    "efficientvit_m0": "BatchNorms inside cascaded attention",
    "fastvit_t8": "parallel branches and layer scale",
    "ghostnet_050": "cheap feature maps, joined and cut",
    "lambda_resnet26t": "slices of channels, 3-D convolutions",
    "levit_128s": "BatchNorms of tokens, folded into the batch dimension",
    "mixnet_s": "convolutions of several kernel sizes",
    "mobilenetv3_small_050": "squeeze and excitation",
    "mobileone_s0": "many parallel branches",
    "mobilevit_xxs": "patches folded into the batch dimension",
    "nextvit_small": "slices of channels in channels-last layout",
    "repghostnet_050": "branches of single BatchNorms",
    "repvit_m1": "a head with BatchNorm1d",
    "starnet_s050": "products of two branches",
    "test_byobnet": "blocks of several kinds",
    "test_coatnet": "convolutions and attention",
    "test_resnet": "the plain case",
    "tf_efficientnet_cc_b0_4e": "kernels that differ between images",
    "xcit_nano_12_p16_224": "BatchNorms of a transformer",
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", NETWORKS)
def test_a_joint_step_equals_separate_steps(arch: str) -> None:
    networks, size = Networks(arch), image_size(arch)
    for layout in LAYOUTS:
        assert compare_steps(networks, size, layout).faults == []


def test_slices_of_channels_run_the_forward_method_of_the_layers() -> None:
    networks = Networks("lambda_resnet26t")
    comparison = compare_steps(networks, 64, torch.channels_last)
    assert 0 < comparison.fast < comparison.calls
    assert comparison.faults == []


def test_a_wrong_value_in_one_batchnorm_is_found() -> None:
    networks = Networks("test_resnet")
    right = compare_steps(networks, 64, torch.contiguous_format)
    assert max(right.float32.values()) <= FLOAT32
    assert right.fast == right.calls > 0
    layers = [layer for layer in networks.joint.modules() if isinstance(layer, RoutedBatchNorm)]
    with torch.no_grad():
        layers[2].aux["adv"].get_parameter("weight")[0] += 0.01
    wrong = compare_steps(networks, 64, torch.contiguous_format)
    assert min(wrong.float32["logits"], wrong.float32["gradients"], wrong.attack["logits"]) > FLOAT32
    assert {fault.split(":")[0] for fault in wrong.faults} >= {"float32", "attack"}
