"""Published training settings, as `--preset paper` applies them; explicit settings take precedence.

EfficientNets use the EfficientNet recipe and AdvProp's, according to the CVPR 2020 paper and the
TPU reference code: RMSProp (decay 0.9, momentum 0.9, ε 0.001), weight decay 1e-5, label smoothing
0.1, BatchNorm momentum 0.99, 350 epochs, a learning rate of 0.016 for 256 images, multiplied by
0.97 every 2.4 epochs after 5 epochs of warm-up, a moving average of the weights with decay 0.9999,
AutoAugment and stochastic depth 0.2.

ResNets use SGD with momentum 0.9, a learning rate of 0.1 for 256 images, weight decay 1e-4 and 105
epochs, as in Fast AdvProp's published script. That script divides the rate by 10 after epochs 30,
60, 90 and 100 and has no warm-up; here a cosine schedule follows 5 epochs of warm-up.

The paper increases ε with the size of the network. Here ε is 1 up to B2 and ResNet-50, 2 up to B5
and for larger ResNets, and 4 for larger EfficientNets. This is an interpretation of "weaker for
smaller networks", because no table was published.
"""

from __future__ import annotations

from typing import Any

from runtime.errors import ConfigError, nearest

__all__ = ["PAPER", "paper"]

_EFFICIENTNET = {  # size, dropout, ε
    "b0": (224, 0.2, 1.0),
    "b1": (240, 0.2, 1.0),
    "b2": (260, 0.3, 1.0),
    "b3": (300, 0.3, 2.0),
    "b4": (380, 0.4, 2.0),
    "b5": (456, 0.4, 2.0),
    "b6": (528, 0.5, 4.0),
    "b7": (600, 0.5, 4.0),
    "b8": (672, 0.5, 4.0),
}
_RESNET = {"resnet50": 1.0, "resnet101": 2.0, "resnet152": 2.0, "resnet200": 2.0}

PAPER = (*(f"efficientnet_{size}" for size in _EFFICIENTNET), *_RESNET)
"""Architectures with published settings, by timm's names."""


def paper(arch: str, batch_size: int) -> dict[str, Any]:
    """Return the published settings of `arch` as nested dicts for `config_file.from_mapping`.

    Args:
        arch: one of PAPER, with or without timm's prefix `tf_`.
        batch_size: clean images per update; the learning rate is proportional to it.

    Raises:
        ConfigError: no settings were published for `arch`.
    """
    name = arch.split(".")[0].removeprefix("tf_")
    if name in _RESNET:
        return {
            "epochs": 105,
            "batch_size": batch_size,
            "attack": {"epsilon": _RESNET[name]},
            "data": {"img_size": 224},
            "optim": {
                "optimizer": "sgd",
                "lr": 0.1 * batch_size / 256,
                "weight_decay": 1e-4,
                "schedule": "cosine",
                "warmup_epochs": 5.0,
                "clip_grad": 0.0,
            },
        }
    if name not in PAPER:
        raise ConfigError(
            f"--preset paper has no settings for {arch!r}; available: {', '.join(PAPER)}. "
            f"{nearest(name, PAPER)} Without --preset, every architecture with BatchNorm can be trained".replace(
                "  ", " "
            )
        )
    size, drop, epsilon = _EFFICIENTNET[name.removeprefix("efficientnet_")]
    return {
        "epochs": 350,
        "batch_size": batch_size,
        "drop": drop,
        "drop_path": 0.2,
        "bn_momentum": 0.01,
        "attack": {"epsilon": epsilon},
        "data": {"img_size": size, "auto_augment": "original"},
        "optim": {
            "optimizer": "rmsproptf",
            "lr": 0.016 * batch_size / 256,
            "weight_decay": 1e-5,
            "schedule": "step",
            "decay_epochs": 2.4,
            "decay_rate": 0.97,
            "warmup_epochs": 5.0,
            "clip_grad": 0.0,
            "ema_decay": 0.9999,
            "options": {"alpha": 0.9, "momentum": 0.9, "eps": 0.001},
        },
    }
