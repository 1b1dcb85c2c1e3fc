"""`TrainConfig`: every setting of a training run. Standard library only.

Where a field may be None, that means "chosen from the model and the data"; `fit` logs
what it chose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from runtime.errors import ConfigError

__all__ = ["AttackConfig", "DataConfig", "OptimConfig", "TrainConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackConfig:
    """L-inf PGD on the training images. The defaults are the paper's weakest attack."""

    epsilon: float = 1.0
    """Largest change of a pixel, in 1/255, whatever the normalisation."""
    steps: int | None = None
    """Gradient steps; None: ε + 1, but one at ε = 1, as published."""
    step_size: float = 1.0
    """Length of a step, in 1/255."""
    targeted: bool = True
    """Towards a random wrong class (as published), else away from the true one."""
    clean_start_share: float = 0.2
    """Share of images whose attack starts from the image itself and not from uniform noise."""

    def __post_init__(self) -> None:
        _check(self.epsilon > 0 and math.isfinite(self.epsilon), "attack.epsilon", "above 0 (in /255)", self.epsilon)
        _check(self.steps is None or self.steps >= 1, "attack.steps", "at least 1", self.steps)
        _check(self.step_size > 0, "attack.step_size", "above 0 (in /255)", self.step_size)
        share = self.clean_start_share
        _check(0 <= share <= 1, "attack.clean_start_share", "from 0 to 1", share)

    @property
    def resolved_steps(self) -> int:
        """Gradient steps, with the published rule applied."""
        if self.steps is not None:
            return self.steps
        return 1 if self.epsilon <= 1 else math.ceil(self.epsilon) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Images and how they are cropped."""

    root: Path | None = None
    """Folder with `train/CLASS/*` and `val/CLASS/*`; None: the embedded digits."""
    img_size: int | None = None
    """Height and width of the network's input, pixels; None: the model's own, or less
    where the images are smaller than that."""
    crop_scale: tuple[float, float] | None = None
    """Share of the area that a random training crop keeps; None: by image size."""
    hflip: float | None = None
    """Probability of mirroring a training image; None: 0.5, but never for the digits."""
    color_jitter: float | None = None
    """Strength of colour jitter; None: 0.4, but none for the digits and small images."""
    workers: int | None = None
    """Loader processes; None: by cores and data."""

    def __post_init__(self) -> None:
        _check(self.img_size is None or self.img_size >= 8, "data.img_size", "at least 8 pixels", self.img_size)
        _check(self.workers is None or self.workers >= 0, "data.workers", "0 or more", self.workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """Optimiser, schedule and losses, by timm's names."""

    optimizer: str = "adamw"
    """A name of `timm.optim`."""
    lr: float = 3e-3
    """Peak learning rate."""
    weight_decay: float = 0.02
    """Weight decay, not applied to biases and BatchNorms."""
    schedule: str = "cosine"
    """A name of `timm.scheduler`, stepped at each update."""
    warmup_epochs: float = 0.5
    """Epochs of linear warm-up."""
    label_smoothing: float = 0.1
    """Smoothing of the targets in both losses."""
    clip_grad: float = 5.0
    """Largest gradient norm; 0 does not clip."""
    ema_decay: float = 0.0
    """Decay of the moving average of weights, warmed up; 0 keeps none."""

    def __post_init__(self) -> None:
        _check(self.lr > 0 and math.isfinite(self.lr), "optim.lr", "above 0", self.lr)
        _check(self.weight_decay >= 0, "optim.weight_decay", "0 or more", self.weight_decay)
        _check(0 <= self.label_smoothing < 1, "optim.label_smoothing", "in [0, 1)", self.label_smoothing)
        _check(0 <= self.ema_decay < 1, "optim.ema_decay", "in [0, 1)", self.ema_decay)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One training run."""

    arch: str
    """timm's name of the architecture."""
    recipe: str = "advprop"
    """A name of `train.recipes.RECIPES`."""
    epochs: int | None = None
    """Passes over the data; None: 8 on the embedded digits, 100 on a folder."""
    batch_size: int | None = None
    """Clean images a step, the adversarial ones come on top; None: 32 on the embedded digits,
    128 up to 64 px, else 64."""
    seed: int = 0
    """Seeds weights, order, augmentation and attack."""
    device: str = "auto"
    """A torch device, or `auto`: CUDA where it is available."""
    pretrained: bool = False
    """Start from timm's pretrained weights (downloaded by timm)."""
    drop_path: float = 0.0
    """Stochastic depth rate, for architectures that have it."""
    out: Path | None = None
    """Folder of checkpoints and metrics; None: `runs/ARCH`."""
    resume: bool = False
    """Continue from `last.pt` in the output folder, where there is one."""
    attack: AttackConfig = field(default_factory=AttackConfig)
    """The training attack."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimisation."""
    eval_attack_images: int = 512
    """Validation images, spread evenly, on which accuracy under attack is measured."""

    def __post_init__(self) -> None:
        _check(self.epochs is None or self.epochs >= 1, "epochs", "at least 1", self.epochs)
        _check(
            self.batch_size is None or self.batch_size >= 2,
            "batch_size",
            "at least 2 (BatchNorm needs it)",
            self.batch_size,
        )

    @property
    def resolved_epochs(self) -> int:
        """Passes over the data, with the default applied."""
        if self.epochs is not None:
            return self.epochs
        return 8 if self.data.root is None else 100

    def resolved_batch_size(self, img_size: int) -> int:
        """Clean images a step at an input of `img_size` pixels, with the default applied."""
        if self.batch_size is not None:
            return self.batch_size
        return 32 if self.data.root is None else 128 if img_size <= 64 else 64

    @property
    def resolved_out(self) -> Path:
        """Output folder, with the default applied."""
        return self.out if self.out is not None else Path("runs") / self.arch


def _check(condition: bool, name: str, expected: str, found: object) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {expected}; found {found}")
