"""Settings of short training runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from train.config import DataConfig, TrainConfig


def short_run(images: Path, out: Path, *, img_size: int = 32, **changes: Any) -> TrainConfig:
    """Return the settings of a run of 4 steps per epoch."""
    config = TrainConfig(
        arch="test_resnet",
        recipe="vanilla",
        epochs=2,
        batch_size=12,
        out=out,
        tensorboard=False,
        eval_attack_images=4,
        data=DataConfig(root=images, img_size=img_size, workers=0),
    )
    return dataclasses.replace(config, **changes)
