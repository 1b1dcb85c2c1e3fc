"""Networks of timm 1.0.31 that have BatchNorms, for tests and benchmarks of all architectures."""

from __future__ import annotations

import timm
import torch

from train.models import unsupported_size

__all__ = ["MORE", "SMALLEST", "find_smallest", "image_size"]

SMALLEST = {
    "byoanet": "halonet_h1",
    "byobnet": "test_byobnet",
    "convmixer": "convmixer_768_32",
    "cpubone": "cpubone_nano",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "maxxvit": "test_coatnet",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilevit": "mobilevit_xxs",
    "nasnet": "nasnetalarge",
    "nextvit": "nextvit_small",
    "pnasnet": "pnasnet5large",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "tiny_vit": "tiny_vit_5m_224",
    "tresnet": "tresnet_m",
    "vgg": "vgg11_bn",
    "visformer": "visformer_tiny",
    "vision_transformer_hybrid": "vit_small_resnet50d_s16_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p16_224",
}
"""Module of timm → its network with BatchNorm that has the fewest parameters."""

MORE = (
    "lambda_resnet26t",
    "lambda_resnet26rpt_256",
    "lamhalobotnet50ts_256",
    "botnet26t_256",
    "mobileone_s0",
    "repvgg_a0",
    "mixnet_s",
    "tf_efficientnet_cc_b0_4e",
)
"""Networks whose layers the smallest ones do not have: attention in convolutional networks,
re-parameterizable branches, mixed and conditional convolutions."""

_LARGER = {"shvit_s1": 128}
"""At 64 px, several of its BatchNorms see one pixel per image, and amplify rounding errors of float64
to 1e-7."""


def find_smallest() -> dict[str, str]:
    """Find `SMALLEST` for the installed timm. It creates all networks, which takes minutes."""
    smallest: dict[str, tuple[int, str]] = {}
    for module in timm.list_modules():
        for arch in timm.list_models(module=module):
            with torch.device("meta"):
                model = timm.create_model(arch)
            if any(isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) for layer in model.modules()):
                size = sum(parameter.numel() for parameter in model.parameters())
                smallest[module] = min(smallest.get(module, (size, arch)), (size, arch))
    return {module: arch for module, (_, arch) in smallest.items()}


def image_size(arch: str) -> int:
    """Return 64, 96 or the size that timm lists: the first that the network accepts, in pixels."""
    if arch in _LARGER:
        return _LARGER[arch]
    own = timm.get_pretrained_cfg(arch).input_size[-1]
    return next(size for size in (64, 96, own) if not unsupported_size(arch, size))
