"""`TrainConfig`: every setting of a training run. Standard library only.

Where a field may be None, that means "chosen from the model and the data"; `fit` logs
what it chose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import ConfigError

if TYPE_CHECKING:
    from train.recipes import Recipe

__all__ = ["AttackConfig", "DataConfig", "OptimConfig", "TrainConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackConfig:
    """L-inf PGD on the training images. The defaults are the paper's weakest attack."""

    epsilon: float = 1.0
    """Largest change of a pixel, in 1/255, whatever the normalization."""
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
    """Folder with `train/CLASS/*` and `val/CLASS/*`, or with tar files of them; where a `dataset` is
    (to be) kept; None: the embedded digits."""
    dataset: str | None = None
    """A data set by timm's name: `torch/cifar10`, `hfds/uoft-cs/cifar10`, `wds/…`, `tfds/…`."""
    train_split: str = "train"
    """What `dataset` calls the part to train on."""
    val_split: str = "validation"
    """What it calls the part to measure on (Hugging Face: often `test`)."""
    input_key: str = ""
    """Column of the images in a Hugging Face, TFDS or WebDataset set; empty: timm's default."""
    target_key: str = ""
    """Column of the labels likewise."""
    num_classes: int = 0
    """Classes of a stream that does not tell them."""
    download: bool = False
    """Let torchvision or TFDS download `dataset`."""
    img_size: int | None = None
    """Height and width of the network's input, pixels; None: the model's own, or less
    where the images are smaller than that."""
    crop_scale: tuple[float, float] | None = None
    """Share of the area that a random training crop keeps; None: by image size."""
    auto_augment: str = ""
    """timm's policy for the clean images, e.g. `original`, `rand-m9-mstd0.5`; empty: none. The
    `fine-grained` recipe has an AutoAugment view of its own besides."""
    mixup: float = 0.0
    """Mixup α on the clean images; 0: none."""
    cutmix: float = 0.0
    """CutMix α on the clean images; 0: none."""
    hflip: float | None = None
    """Probability of mirroring a training image; None: 0.5, but never for the digits."""
    color_jitter: float | None = None
    """Strength of color jitter; None: 0.4, but none for the digits and small images."""
    workers: int | None = None
    """Loader processes; None: by cores and data."""

    def __post_init__(self) -> None:
        _check(self.img_size is None or self.img_size >= 8, "data.img_size", "at least 8 pixels", self.img_size)
        _check(self.workers is None or self.workers >= 0, "data.workers", "0 or more", self.workers)

    @property
    def embedded(self) -> bool:
        """Whether the embedded digits are what is trained on."""
        return self.root is None and self.dataset is None


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """Optimizer, schedule and losses, by timm's names."""

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
    accumulate: int = 1
    """Batches whose gradients are added up for one update."""
    options: dict[str, float] = field(default_factory=dict)
    """Further arguments of the optimizer, e.g. `alpha`, `momentum`, `eps`."""
    decay_epochs: float = 2.4
    """Epochs between decays, for the `step` schedule."""
    decay_rate: float = 0.97
    """Factor of a decay, for the `step` schedule."""

    def __post_init__(self) -> None:
        _check(self.lr > 0 and math.isfinite(self.lr), "optim.lr", "above 0", self.lr)
        _check(self.weight_decay >= 0, "optim.weight_decay", "0 or more", self.weight_decay)
        _check(0 <= self.label_smoothing < 1, "optim.label_smoothing", "in [0, 1)", self.label_smoothing)
        _check(self.accumulate >= 1, "optim.accumulate", "at least 1", self.accumulate)
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
    amp: str = "none"
    """Mixed precision of attack and step: `none`, `bf16` or `fp16`."""
    compile: bool = False
    """Compile the network with torch.compile."""
    pretrained: bool = False
    """Start from timm's pretrained weights (downloaded by timm)."""
    init_checkpoint: Path | None = None
    """Start from the main route's weights of this checkpoint (needed by `finetune`)."""
    drop: float = 0.0
    """Dropout rate before the classifier."""
    drop_path: float = 0.0
    """Stochastic depth rate, for architectures that have it."""
    bn_momentum: float | None = None
    """Momentum of running statistics in torch's sense (0.01 keeps 99 %); None: the model's."""
    sync_bn: bool = True
    """With several processes: batch statistics over all of them, route by route."""
    save_every: int = 0
    """Also write `last.pt` each so many steps; 0: after each epoch only."""
    log_every: int = 50
    """Updates between the entries of TensorBoard and W&B: loss by branch, learning rate."""
    tensorboard: bool = True
    """Write event files for TensorBoard."""
    wandb: str = ""
    """Project of Weights & Biases to log to (needs the package `wandb`); empty: none."""
    out: Path | None = None
    """Folder of checkpoints and metrics; None: `runs/ARCH`, with `-RECIPE` for any but advprop."""
    resume: str = "never"
    """`auto`: continue from `last.pt` in the output folder where there is one; or `never`."""
    overwrite: bool = False
    """Start anew in an output folder that has a `last.pt`, which is lost."""
    attack: AttackConfig = field(default_factory=AttackConfig)
    """The training attack."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimization."""
    eval_attack_images: int = 512
    """Validation images, spread evenly, on which accuracy under attack is measured."""

    def __post_init__(self) -> None:
        _check(self.epochs is None or self.epochs >= 1, "epochs", "at least 1", self.epochs)
        _check(self.amp in ("none", "bf16", "fp16"), "amp", "none, bf16 or fp16", self.amp)
        _check(self.resume in ("auto", "never"), "resume", "auto or never", self.resume)
        _check(self.log_every >= 1, "log_every", "at least 1 update", self.log_every)
        _check(self.save_every >= 0, "save_every", "0 or more steps", self.save_every)
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
        return 8 if self.data.embedded else 100

    def resolved_batch_size(self, img_size: int) -> int:
        """Clean images a step at an input of `img_size` pixels, with the default applied."""
        if self.batch_size is not None:
            return self.batch_size
        return 32 if self.data.embedded else 128 if img_size <= 64 else 64

    def resolved_attack(self, recipe: Recipe) -> AttackConfig:
        """The attack: what the recipe prescribes, where a field was left at its default."""
        default = AttackConfig()
        prescribed = {
            name: value for name, value in recipe.attack.items() if getattr(self.attack, name) == getattr(default, name)
        }
        changes: dict[str, Any] = dict(prescribed)
        return replace(self.attack, **changes)

    @property
    def resolved_out(self) -> Path:
        """Output folder, with the default applied."""
        if self.out is not None:
            return self.out
        return Path("runs") / (self.arch if self.recipe == "advprop" else f"{self.arch}-{self.recipe}")


def _check(condition: bool, name: str, expected: str, found: object) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {expected}; found {found}")
