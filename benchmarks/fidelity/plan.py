"""The training runs of the study: their order and their settings."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config import AttackConfig, DataConfig, OptimConfig, TrainConfig

__all__ = ["LONG", "MAIN_RECIPES", "OTHER_RECIPES", "REPEATED", "TUNED", "Cell", "Plan", "Settings", "cost", "trials"]

TUNED = ("vanilla", "advprop")
"""Recipes that settings are chosen for."""
MAIN_RECIPES = (*TUNED, "shared-bn", "adversarial", "finetune")
"""Recipes of the slides' statements."""
LONG = "vanilla-long"
"""Vanilla with as many passes over the images as AdvProp makes."""
OTHER_RECIPES = (LONG, "shared-statistics", "fast", "fine-grained")
"""Recipes that are trained later."""
REPEATED = (*MAIN_RECIPES, LONG, "shared-statistics")
"""Recipes that are trained with all seeds; the others are trained with the first one."""

_LEARNING_RATES = (1e-3, 3e-3, 1e-2)
_WEIGHT_DECAYS = (0.02, 0.1, 0.5)
_EPSILONS = (1.0, 2.0, 4.0)
_CLEAN = ("vanilla", LONG, "finetune")
"""Recipes with the settings chosen for vanilla; the others have those chosen for AdvProp."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that are chosen on held-out images."""

    lr: float
    """Peak learning rate."""
    weight_decay: float
    """Weight decay of AdamW."""
    epsilon: float = 1.0
    """Strength of the training attack, in 1/255 of the pixel range."""

    def __str__(self) -> str:
        return f"learning rate {self.lr:g}, weight decay {self.weight_decay:g}, ε {self.epsilon:g}"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run."""

    recipe: str
    """Name of a recipe in `train.recipes.RECIPES`, or LONG."""
    seed: int
    """Seed of the run."""
    images: int
    """Training images."""
    arch: str
    """Name of the architecture."""
    epochs: int
    """Epochs of a vanilla run; some recipes train for more or fewer."""
    settings: Settings
    """Learning rate, weight decay and ε."""
    amp: str = "none"
    """Mixed precision, as in TrainConfig."""
    purpose: str = "final"
    """`final` or `tune`."""

    @property
    def name(self) -> str:
        """Name of the folder: readable, and different for different settings."""
        key = hashlib.sha256(repr(dataclasses.astuple(self)).encode()).hexdigest()[:6]
        return f"{self.purpose}-{self.recipe}-{self.arch}-{self.images}-seed{self.seed}-{key}"

    def config(
        self, root: Path, out: Path, *, device: str, workers: int | None = None, start: Path | None = None
    ) -> TrainConfig:
        """Return the trainer's configuration, which does not rely on defaults that depend on the data.

        Args:
            root: folder with train/CLASS and val/CLASS.
            out: folder of the run.
            device: torch device.
            workers: loader processes (default: none on a CPU, otherwise the trainer's default).
            start: checkpoint that `finetune` starts from.
        """
        epochs, lr = self.epochs, self.settings.lr
        if self.recipe == LONG:
            epochs = round(epochs * cost("advprop", self.settings.epsilon))
        if self.recipe == "finetune":
            epochs, lr = max(1, epochs // 2), lr / 3
        return TrainConfig(
            arch=self.arch,
            recipe="vanilla" if self.recipe == LONG else self.recipe,
            epochs=epochs,
            batch_size=128 if self.images >= 1_000 else 8,
            seed=self.seed,
            device=device,
            amp=self.amp,
            tensorboard=False,
            out=out,
            resume="auto",
            init_checkpoint=start,
            eval_attack_images=16,
            # The recipe `fast` prescribes its own attack, which explicit settings would replace.
            attack=AttackConfig() if self.recipe == "fast" else AttackConfig(epsilon=self.settings.epsilon),
            data=DataConfig(
                root=root,
                workers=0 if workers is None and device == "cpu" else workers,
                img_size=32,
                crop_scale=(0.5, 1.0),
                hflip=0.5,
                color_jitter=0.0,
            ),
            optim=OptimConfig(lr=lr, weight_decay=self.settings.weight_decay, warmup_epochs=0.5),
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The size of the study."""

    images: int
    """Training images of the main comparison."""
    epochs: int
    """Epochs of a vanilla run of the main comparison."""
    tuning_epochs: int
    """Epochs of each trial."""
    arch: str
    """Name of the architecture."""
    amp: str
    """Mixed precision, as in TrainConfig."""
    seeds: int = 3
    """Seeds of the main comparison."""
    sizes: tuple[tuple[int, int], ...] = ()
    """(training images, epochs) of the comparison of vanilla and AdvProp over data size."""
    tuning_images: int | None = None
    """Training images of each trial (default: `images`)."""
    levels: int = 3
    """Values of learning rate, weight decay and ε that the trials combine, at most 3."""
    wide: str = ""
    """Wider architecture on which vanilla and AdvProp are compared, or none."""

    def main_cells(self, chosen: dict[str, Settings]) -> Iterator[Cell]:
        """Yield the runs of the main comparison, the most informative first."""
        seeds = range(self.seeds)
        yield from (self.cell(recipe, seed, chosen) for seed in seeds for recipe in TUNED)
        rest = [recipe for recipe in MAIN_RECIPES if recipe not in TUNED and recipe != "finetune"]
        yield from (self.cell(recipe, seed, chosen) for seed in seeds for recipe in rest)
        yield from (self.cell("finetune", seed, chosen) for seed in seeds)  # after `adversarial`

    def other_cells(self, chosen: dict[str, Settings]) -> Iterator[Cell]:
        """Yield the runs of other recipes, data sizes and widths: first one seed of each, then the other seeds."""
        for seed in range(self.seeds):
            recipes = [recipe for recipe in OTHER_RECIPES if seed == 0 or recipe in REPEATED]
            yield from (self.cell(recipe, seed, chosen) for recipe in recipes)
            for images, epochs in self.sizes:
                yield from (self.cell(recipe, seed, chosen, images=images, epochs=epochs) for recipe in TUNED)
            if self.wide and seed == 0:
                yield from (self.cell(recipe, seed, chosen, arch=self.wide) for recipe in TUNED)

    def cell(self, recipe: str, seed: int, chosen: dict[str, Settings], **changes: Any) -> Cell:
        """Return a run of the main comparison, with changes."""
        settings = chosen["vanilla" if recipe in _CLEAN else "advprop"]
        if recipe == LONG:  # its length depends on the attack that AdvProp makes
            settings = dataclasses.replace(settings, epsilon=chosen["advprop"].epsilon)
        base = Cell(
            recipe=recipe,
            seed=seed,
            images=self.images,
            arch=self.arch,
            epochs=self.epochs,
            amp=self.amp,
            settings=settings,
        )
        return dataclasses.replace(base, **changes)


def cost(recipe: str, epsilon: float) -> float:
    """Return the passes over the images that a run makes, relative to vanilla (see train/recipes.py)."""
    steps = AttackConfig(epsilon=epsilon).resolved_steps
    factors = {
        "vanilla": 1.0,
        "finetune": 0.5,
        "adversarial": (2 * steps + 3) / 3,
        "fast": 1.2,
        "fine-grained": (2 * steps + 9) / 3,
    }
    return factors.get(recipe, (2 * steps + 6) / 3)


def trials(plan: Plan, recipe: str) -> list[Cell]:
    """Return the trials of a recipe, all with the first seed: nine if there are three levels.

    For vanilla, they are a full grid of learning rate and weight decay. AdvProp has a third factor,
    ε: its trials are an orthogonal array (Taguchi's L9), in which every pair of levels of two
    factors occurs once.
    """
    return [
        Cell(
            recipe=recipe,
            seed=0,
            images=min(plan.tuning_images or plan.images, 45_000),
            arch=plan.arch,
            epochs=plan.tuning_epochs,
            amp=plan.amp,
            purpose="tune",
            settings=Settings(
                lr=_LEARNING_RATES[row],
                weight_decay=_WEIGHT_DECAYS[column],
                epsilon=_EPSILONS[(row + column) % plan.levels] if recipe == "advprop" else 1.0,
            ),
        )
        for row, column in itertools.product(range(plan.levels), repeat=2)
    ]
