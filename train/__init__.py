"""Train networks with dual BatchNorm on clean and adversarial images (AdvProp).

`python -m train.run --arch efficientnet_b3` trains a network. `AdvPropTask`, `LinfPGD` and
`add_auxiliary_bns` are building blocks for your own training loop. Names are imported on first use,
so command-line help does not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.system.lazy import lazy_names

if TYPE_CHECKING:
    from train.attack import LinfPGD
    from train.config import AttackConfig, DataConfig, OptimConfig, TrainConfig
    from train.dual_bn import add_auxiliary_bns, route, strip_auxiliary
    from train.loop import fit
    from train.task import AdvPropTask

__all__ = [
    "AdvPropTask",
    "AttackConfig",
    "DataConfig",
    "LinfPGD",
    "OptimConfig",
    "TrainConfig",
    "add_auxiliary_bns",
    "fit",
    "route",
    "strip_auxiliary",
]

_MODULES = {
    "AdvPropTask": "train.task",
    "AttackConfig": "train.config",
    "DataConfig": "train.config",
    "LinfPGD": "train.attack",
    "OptimConfig": "train.config",
    "TrainConfig": "train.config",
    "add_auxiliary_bns": "train.dual_bn",
    "fit": "train.loop",
    "route": "train.dual_bn",
    "strip_auxiliary": "train.dual_bn",
}

__getattr__ = lazy_names(__name__, _MODULES)
