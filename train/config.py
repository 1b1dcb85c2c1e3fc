"""`TrainConfig`: every setting of a training run. Uses the standard library only.

A field whose default is None is chosen from the model and the data; `fit` logs the choice. Each
field declares its range with `setting`; `train.limits` checks types and ranges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from runtime.spec import EXIF_RULES
from train.limits import check_fields, setting
from train.recipes import Recipe, find_recipe

__all__ = ["AttackConfig", "DataConfig", "OptimConfig", "TrainConfig"]

_LR, _LR_FROM_WEIGHTS = 3e-3, 5e-4
_MIN_BATCH, _MIN_BATCHES = 8, 8
"""The default batch size is halved down to 8 images until an epoch has 8 batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackConfig:
    """L-inf PGD on the training images. The defaults are the paper's weakest attack."""

    epsilon: float = setting(1.0, above=0, at_most=255, unit="1/255 of the pixel range")
    """Maximum change of a pixel, in 1/255 of the pixel range."""
    steps: int | None = setting(None, at_least=1, at_most=10_000)
    """Number of gradient steps (default: the published ε + 1, except 1 at ε = 1)."""
    step_size: float = setting(1.0, above=0, at_most=255, unit="1/255 of the pixel range")
    """Size of a step, in 1/255 of the pixel range."""
    targeted: bool = True
    """Attack toward a random wrong class, as published; otherwise away from the true class."""
    clean_start_share: float = setting(0.2, at_least=0, at_most=1)
    """Share of images whose attack starts from the clean image instead of uniform noise."""

    def __post_init__(self) -> None:
        check_fields(self, "attack")

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
    """Folder with `train/CLASS/*` and `val/CLASS/*`, or with tar files of them; a folder with
    `CLASS/*`, which is split; or a CSV or JSON-lines file of paths and labels. With `dataset`, the
    folder that stores it (default: train on the embedded digits)."""
    val: Path | None = None
    """Folder with `CLASS/*`, or a CSV or JSON-lines file, of the validation images (default: those
    of `root`)."""
    val_share: float = setting(0.2, above=0, below=1)
    """Share of each class for validation, if `root` has no validation images and `val` is not set."""
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
    num_classes: int = setting(0, at_least=0, at_most=1_000_000)
    """Number of classes of a stream, if its metadata does not include it."""
    download: bool = False
    """Allow torchvision or TFDS to download `dataset`."""
    img_size: int | None = setting(None, at_least=8, at_most=8192, unit="pixels")
    """Height and width of the network's input, in pixels (default: the model's own, or smaller if
    the images are smaller)."""
    exif: str = setting("upright", one_of=EXIF_RULES)
    """EXIF orientation of photographs: `upright` applies it, as viewers do; `ignore` does not, as in
    torchvision and timm. The model file records it for calibration, evaluation and serving."""
    crop_scale: tuple[float, float] | None = setting(None, above=0, at_most=1)
    """Range of the area share that a random training crop covers (default: by image size and
    number of images)."""
    auto_augment: str = ""
    """timm's augmentation policy for the clean images, e.g. `original` or `rand-m9-mstd0.5`
    (default: none). The `fine-grained` recipe also has its own AutoAugment view."""
    mixup: float = setting(0.0, at_least=0, at_most=1000)
    """MixUp α for the clean images; 0 disables it."""
    cutmix: float = setting(0.0, at_least=0, at_most=1000)
    """CutMix α for the clean images; 0 disables it."""
    hflip: float | None = setting(None, at_least=0, at_most=1)
    """Probability of flipping a training image horizontally (default: 0.5; 0 for the digits)."""
    color_jitter: float | None = setting(None, at_least=0, at_most=10)
    """Strength of color jitter (default: 0.4; 0 for the digits and for small images)."""
    balance: str = setting("none", one_of=("none", "sampler", "loss"))
    """What to do about classes with few images: `sampler` draws all classes equally often, `loss`
    weights the images of a class by the inverse of its size, `none` does neither."""
    workers: int | None = setting(None, at_least=0, at_most=1024)
    """Loader processes (default: by number of cores and kind of data)."""

    def __post_init__(self) -> None:
        check_fields(self, "data")

    @property
    def embedded(self) -> bool:
        """Whether the run trains on the embedded digits."""
        return self.root is None and self.dataset is None


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """Optimizer, schedule and losses, by timm's names."""

    optimizer: str = "adamw"
    """Name of an optimizer in `timm.optim`."""
    lr: float | None = setting(None, above=0)
    """Peak learning rate (default: 3e-3, or 5e-4 from weights)."""
    weight_decay: float = setting(0.02, at_least=0)
    """Weight decay; biases and BatchNorms have none."""
    schedule: str = "cosine"
    """Name of a learning rate schedule in `timm.scheduler`; it advances at each update."""
    layer_decay: float | None = setting(None, above=0, at_most=1)
    """Factor of the learning rate from one layer to the layer before it, as in timm (default: one
    learning rate for all layers)."""
    warmup_epochs: float = setting(0.5, at_least=0)
    """Epochs of linear warm-up."""
    label_smoothing: float = setting(0.1, at_least=0, below=1)
    """Label smoothing of the losses of all branches."""
    clip_grad: float = setting(5.0, at_least=0)
    """Maximum gradient norm; 0 disables clipping."""
    ema_decay: float = setting(0.0, at_least=0, below=1)
    """Decay of the moving average of the weights, warmed up; 0 disables it."""
    accumulate: int = setting(1, at_least=1, at_most=1_000_000)
    """Batches whose gradients are averaged for one update."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other arguments of the optimizer, e.g. `alpha`, `momentum`, `eps`."""
    decay_epochs: float = setting(2.4, above=0)
    """Epochs between decays of the `step` schedule."""
    decay_rate: float = setting(0.97, above=0, at_most=1)
    """Factor of each decay of the `step` schedule."""

    def __post_init__(self) -> None:
        check_fields(self, "optim")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Settings of one training run."""

    arch: str
    """timm's name of the architecture."""
    recipe: str = "advprop"
    """Name of a recipe in `train.recipes.RECIPES`."""
    epochs: int | None = setting(None, at_least=1, at_most=1_000_000)
    """Passes over the training images (default: 8 for the embedded digits, otherwise 100)."""
    batch_size: int | None = setting(None, at_least=2, at_most=1_000_000)
    """Clean images per step and process; adversarial ones are added to them (default: 32 for the
    embedded digits, otherwise 128 up to 64 px and 64 above, or less for fewer than 8 batches)."""
    seed: int = setting(0, at_least=0, at_most=2**32 - 1)
    """Seed of weights, order, augmentation and attack."""
    device: str = "auto"
    """torch device, or `auto` for CUDA if a GPU is available."""
    amp: str = setting("none", one_of=("none", "bf16", "fp16"))
    """Mixed precision of attack and step: `none`, `bf16` or `fp16`."""
    compile: bool = False
    """Compile the network with torch.compile."""
    pretrained: bool = False
    """Start from timm's pretrained weights, which timm downloads."""
    init_checkpoint: Path | None = None
    """File whose weights training starts from: a checkpoint, or a state dict as `.pt`, `.pth` or
    `.safetensors` (required by `finetune`). The option is `--weights`."""
    init_route: str = "main"
    """BatchNorm route of `init_checkpoint` that training starts from. All routes of the new run
    start as copies of it."""
    freeze_backbone: int = setting(0, at_least=0, at_most=1_000_000)
    """Epochs at the start in which only the classifier is trained."""
    drop: float = setting(0.0, at_least=0, below=1)
    """Dropout rate before the classifier."""
    drop_path: float = setting(0.0, at_least=0, below=1)
    """Stochastic depth rate, for architectures that support it."""
    bn_momentum: float | None = setting(None, above=0, at_most=1)
    """Momentum of running statistics; as in torch, 0.01 keeps 99% (default: the model's)."""
    sync_bn: bool = True
    """Compute batch statistics over all processes, separately for each route."""
    save_every: int = setting(0, at_least=0, at_most=10**12)
    """Updates between additional saves of `last.pt`; 0 saves after each epoch only."""
    log_every: int = setting(50, at_least=1, at_most=10**12)
    """Updates between TensorBoard and W&B entries of losses and learning rate."""
    tensorboard: bool = True
    """Write event files for TensorBoard."""
    wandb: str = ""
    """Weights & Biases project to log to; needs the package `wandb` (default: none)."""
    out: Path | None = None
    """Folder of checkpoints and metrics (default: `runs/ARCH`, or `runs/ARCH-RECIPE` for recipes
    other than advprop)."""
    resume: str = "never"
    """`auto` continues from `last.pt` in the output folder if it exists; `never` does not. The path
    of a `last.pt`, or of its folder, continues that run."""
    restart_schedule: bool | None = None
    """Whether a run that resumes starts the learning rate schedule again, for the remaining epochs.
    Otherwise the schedule continues as if the run had started with these settings (default: if the
    learning rate or the name of the schedule changes)."""
    overwrite: bool = False
    """Start a new run in an output folder with a `last.pt`, and replace it."""
    attack: AttackConfig = field(default_factory=AttackConfig)
    """The training attack."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimization."""
    eval_attack_images: int = setting(512, at_least=1, at_most=10**12)
    """Validation images, evenly spaced, on which accuracy under attack is measured."""

    def __post_init__(self) -> None:
        check_fields(self)
        find_recipe(self.recipe)

    @property
    def resolved_epochs(self) -> int:
        """Passes over the training images, with the default applied."""
        if self.epochs is not None:
            return self.epochs
        return 8 if self.data.embedded else 100

    def resolved_batch_size(self, img_size: int, images: int | None = None) -> int:
        """Return the clean images per step.

        Args:
            img_size: input size in pixels.
            images: number of training images per process, if it is known.
        """
        size = self.batch_size
        if size is None:
            size = 32 if self.data.embedded else 128 if img_size <= 64 else 64
            while images is not None and size > _MIN_BATCH and images < _MIN_BATCHES * size:
                size //= 2
        return size if images is None else max(2, min(size, images))

    @property
    def resolved_lr(self) -> float:
        """Peak learning rate, with the default applied."""
        if self.optim.lr is not None:
            return self.optim.lr
        return _LR_FROM_WEIGHTS if self.pretrained or self.init_checkpoint is not None else _LR

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
