"""`TrainConfig`: every setting of a training run. Uses the standard library only.

A field whose default is None is chosen from the model and the data; `fit` logs the choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import ConfigError
from runtime.spec import EXIF_RULES

if TYPE_CHECKING:
    from train.recipes import Recipe

__all__ = ["AttackConfig", "DataConfig", "OptimConfig", "TrainConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackConfig:
    """L-inf PGD on the training images. The defaults are the paper's weakest attack."""

    epsilon: float = 1.0
    """Maximum change of a pixel, in 1/255 of the pixel range."""
    steps: int | None = None
    """Number of gradient steps (default: the published ε + 1, except 1 at ε = 1)."""
    step_size: float = 1.0
    """Size of a step, in 1/255 of the pixel range."""
    targeted: bool = True
    """Attack toward a random wrong class, as published; otherwise away from the true class."""
    clean_start_share: float = 0.2
    """Share of images whose attack starts from the clean image instead of uniform noise."""

    def __post_init__(self) -> None:
        _check(self.epsilon > 0 and math.isfinite(self.epsilon), "attack.epsilon", "above 0 (in /255)", self.epsilon)
        _check(self.steps is None or self.steps >= 1, "attack.steps", "at least 1", self.steps)
        _check(self.step_size > 0, "attack.step_size", "above 0 (in /255)", self.step_size)
        share = self.clean_start_share
        _check(0 <= share <= 1, "attack.clean_start_share", "from 0 to 1", share)

    @property
    def resolved_steps(self) -> int:
        """Number of gradient steps, with the published rule applied."""
        if self.steps is not None:
            return self.steps
        return 1 if self.epsilon <= 1 else math.ceil(self.epsilon) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The images and their augmentation."""

    root: Path | None = None
    """Folder with `train/CLASS/*` and `val/CLASS/*`, or with tar files of them; with `dataset`, the
    folder that stores it (default: train on the embedded digits)."""
    dataset: str | None = None
    """Dataset by timm's name: `torch/cifar10`, `hfds/uoft-cs/cifar10`, `wds/…`, `tfds/…`."""
    train_split: str = "train"
    """Split of `dataset` for training."""
    val_split: str = "validation"
    """Split of `dataset` for validation. Hugging Face datasets often call it `test`."""
    input_key: str = ""
    """Image column of a Hugging Face, TFDS or WebDataset dataset (default: timm's)."""
    target_key: str = ""
    """Label column of a Hugging Face, TFDS or WebDataset dataset (default: timm's)."""
    num_classes: int = 0
    """Number of classes of a stream, if its metadata does not include it."""
    download: bool = False
    """Allow torchvision or TFDS to download `dataset`."""
    img_size: int | None = None
    """Height and width of the network's input, in pixels (default: the model's own, or smaller if
    the images are smaller)."""
    exif: str = "upright"
    """EXIF orientation of photographs: `upright` applies it, as viewers do; `ignore` does not, as in
    torchvision and timm. The model file records it for calibration, evaluation and serving."""
    crop_scale: tuple[float, float] | None = None
    """Range of the area share that a random training crop covers (default: by image size)."""
    auto_augment: str = ""
    """timm's augmentation policy for the clean images, e.g. `original` or `rand-m9-mstd0.5`
    (default: none). The `fine-grained` recipe also has its own AutoAugment view."""
    mixup: float = 0.0
    """MixUp α for the clean images; 0 disables it."""
    cutmix: float = 0.0
    """CutMix α for the clean images; 0 disables it."""
    hflip: float | None = None
    """Probability of flipping a training image horizontally (default: 0.5; 0 for the digits)."""
    color_jitter: float | None = None
    """Strength of color jitter (default: 0.4; 0 for the digits and for small images)."""
    workers: int | None = None
    """Loader processes (default: by number of cores and kind of data)."""

    def __post_init__(self) -> None:
        _check(self.img_size is None or self.img_size >= 8, "data.img_size", "at least 8 pixels", self.img_size)
        _check(self.exif in EXIF_RULES, "data.exif", " or ".join(EXIF_RULES), self.exif)
        _check(self.workers is None or self.workers >= 0, "data.workers", "0 or more", self.workers)

    @property
    def embedded(self) -> bool:
        """Whether the run trains on the embedded digits."""
        return self.root is None and self.dataset is None


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """Optimizer, schedule and losses, by timm's names."""

    optimizer: str = "adamw"
    """Name of an optimizer in `timm.optim`."""
    lr: float = 3e-3
    """Peak learning rate."""
    weight_decay: float = 0.02
    """Weight decay; biases and BatchNorms have none."""
    schedule: str = "cosine"
    """Name of a learning rate schedule in `timm.scheduler`; it advances at each update."""
    warmup_epochs: float = 0.5
    """Epochs of linear warm-up."""
    label_smoothing: float = 0.1
    """Label smoothing of the losses of all branches."""
    clip_grad: float = 5.0
    """Maximum gradient norm; 0 disables clipping."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights, warmed up; 0 disables it."""
    accumulate: int = 1
    """Batches whose gradients are averaged for one update."""
    options: dict[str, float] = field(default_factory=dict)
    """Other arguments of the optimizer, e.g. `alpha`, `momentum`, `eps`."""
    decay_epochs: float = 2.4
    """Epochs between decays of the `step` schedule."""
    decay_rate: float = 0.97
    """Factor of each decay of the `step` schedule."""

    def __post_init__(self) -> None:
        _check(self.lr > 0 and math.isfinite(self.lr), "optim.lr", "above 0", self.lr)
        _check(self.weight_decay >= 0, "optim.weight_decay", "0 or more", self.weight_decay)
        _check(0 <= self.label_smoothing < 1, "optim.label_smoothing", "in [0, 1)", self.label_smoothing)
        _check(self.accumulate >= 1, "optim.accumulate", "at least 1", self.accumulate)
        _check(0 <= self.ema_decay < 1, "optim.ema_decay", "in [0, 1)", self.ema_decay)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Settings of one training run."""

    arch: str
    """timm's name of the architecture."""
    recipe: str = "advprop"
    """Name of a recipe in `train.recipes.RECIPES`."""
    epochs: int | None = None
    """Passes over the training images (default: 8 for the embedded digits, otherwise 100)."""
    batch_size: int | None = None
    """Clean images per step and process; adversarial ones are added to them (default: 32 for the
    embedded digits, otherwise 128 up to 64 px and 64 above)."""
    seed: int = 0
    """Seed of weights, order, augmentation and attack."""
    device: str = "auto"
    """torch device, or `auto` for CUDA if a GPU is available."""
    amp: str = "none"
    """Mixed precision of attack and step: `none`, `bf16` or `fp16`."""
    compile: bool = False
    """Compile the network with torch.compile."""
    pretrained: bool = False
    """Start from timm's pretrained weights, which timm downloads."""
    init_checkpoint: Path | None = None
    """Checkpoint whose main-route weights training starts from (required by `finetune`)."""
    drop: float = 0.0
    """Dropout rate before the classifier."""
    drop_path: float = 0.0
    """Stochastic depth rate, for architectures that support it."""
    bn_momentum: float | None = None
    """Momentum of running statistics; as in torch, 0.01 keeps 99% (default: the model's)."""
    sync_bn: bool = True
    """Compute batch statistics over all processes, separately for each route."""
    save_every: int = 0
    """Updates between additional saves of `last.pt`; 0 saves after each epoch only."""
    log_every: int = 50
    """Updates between TensorBoard and W&B entries of losses and learning rate."""
    tensorboard: bool = True
    """Write event files for TensorBoard."""
    wandb: str = ""
    """Weights & Biases project to log to; needs the package `wandb` (default: none)."""
    out: Path | None = None
    """Folder of checkpoints and metrics (default: `runs/ARCH`, or `runs/ARCH-RECIPE` for recipes
    other than advprop)."""
    resume: str = "never"
    """`auto` continues from `last.pt` in the output folder if it exists; `never` does not."""
    overwrite: bool = False
    """Start a new run in an output folder with a `last.pt`, and replace it."""
    attack: AttackConfig = field(default_factory=AttackConfig)
    """The training attack."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimization."""
    eval_attack_images: int = 512
    """Validation images, evenly spaced, on which accuracy under attack is measured."""

    def __post_init__(self) -> None:
        _check(self.epochs is None or self.epochs >= 1, "epochs", "at least 1", self.epochs)
        _check(self.amp in ("none", "bf16", "fp16"), "amp", "none, bf16 or fp16", self.amp)
        _check(self.resume in ("auto", "never"), "resume", "auto or never", self.resume)
        _check(self.log_every >= 1, "log_every", "at least 1 update", self.log_every)
        _check(self.save_every >= 0, "save_every", "0 or more updates", self.save_every)
        _check(
            self.batch_size is None or self.batch_size >= 2,
            "batch_size",
            "at least 2 (BatchNorm needs it)",
            self.batch_size,
        )

    @property
    def resolved_epochs(self) -> int:
        """Passes over the training images, with the default applied."""
        if self.epochs is not None:
            return self.epochs
        return 8 if self.data.embedded else 100

    def resolved_batch_size(self, img_size: int) -> int:
        """Return the clean images per step for an input of `img_size` pixels."""
        if self.batch_size is not None:
            return self.batch_size
        return 32 if self.data.embedded else 128 if img_size <= 64 else 64

    def resolved_attack(self, recipe: Recipe) -> AttackConfig:
        """Return the attack settings: those of the recipe replace fields with default values."""
        default = AttackConfig()
        prescribed: dict[str, Any] = {
            name: value for name, value in recipe.attack.items() if getattr(self.attack, name) == getattr(default, name)
        }
        return replace(self.attack, **prescribed)

    @property
    def resolved_out(self) -> Path:
        """Output folder, with the default applied."""
        if self.out is not None:
            return self.out
        return Path("runs") / (self.arch if self.recipe == "advprop" else f"{self.arch}-{self.recipe}")


def _check(condition: bool, name: str, expected: str, found: object) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {expected}; found {found}")
