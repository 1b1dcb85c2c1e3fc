"""What is attacked with what: `AttackConfig`, checked."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.errors import ConfigError, nearest
from runtime.evaluate.attacks.ball import radius_of
from runtime.evaluate.attacks.square import INITIAL_SHARE
from runtime.spec import ModelSpec

__all__ = ["ATTACKS", "GRADIENT", "NOISE", "SQUARE", "AttackConfig", "default_attacks", "default_epsilon"]

NOISE, SQUARE = "noise", "square"
GRADIENT = ("pgd", "apgd")
"""Attacks that need a gradient, and so a checkpoint: what they find is shown to the models."""
ATTACKS = (*GRADIENT, SQUARE, NOISE)
"""All, in the order in which they are made and reported."""

_SMALL = 64
"""Networks of images up to so many pixels wide are attacked as CIFAR's are."""


def default_attacks(has_checkpoint: bool) -> tuple[str, ...]:
    """Returns the attacks that are made where none are named."""
    return ATTACKS if has_checkpoint else (SQUARE, NOISE)


def default_epsilon(spec: ModelSpec) -> float:
    """Returns the usual ε in 1/255: ImageNet's 4, or CIFAR's 8 for small images."""
    return 8.0 if max(spec.preprocessing.height, spec.preprocessing.width) <= _SMALL else 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackConfig:
    """Which attacks, how strong. All of it shows in the result."""

    attacks: tuple[str, ...]
    """Some of ATTACKS."""
    epsilons: tuple[float, ...]
    """Largest changes of a pixel, in 1/255."""
    queries: int = 1000
    """Square attack's budget of an image."""
    initial_share: float = INITIAL_SHARE
    """Share of the pixels in Square attack's first squares."""
    draws: int = 10
    """Noises an image; the worst counts."""
    steps: int = 20
    """Gradients of PGD, and of APGD for each of its losses."""
    restarts: int = 1
    """Random starts of PGD, and of APGD for each of its losses."""
    seed: int = 0
    """What is drawn: starts, squares, noise."""

    def __post_init__(self) -> None:
        for name in self.attacks:
            if name not in ATTACKS:
                raise ConfigError(f"no attack {name!r}; {nearest(name, ATTACKS) or 'there are ' + ', '.join(ATTACKS)}")
        if not self.attacks or not self.epsilons:
            raise ConfigError(f"expected at least one attack and one ε; found {self.attacks} and {self.epsilons}")
        for field in ("queries", "draws", "steps", "restarts"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} must be at least 1; found {getattr(self, field)}")
        if not 0 < self.initial_share <= 1:
            raise ConfigError(f"initial_share must be above 0 and at most 1; found {self.initial_share}")
        for epsilon in self.epsilons:
            radius_of(epsilon)
        # Each once, and in one order, so that the same work has the same name.
        object.__setattr__(self, "attacks", tuple(name for name in ATTACKS if name in self.attacks))
        object.__setattr__(self, "epsilons", tuple(sorted(set(self.epsilons))))

    @property
    def gradient(self) -> tuple[str, ...]:
        """Those of the attacks that need a checkpoint."""
        return tuple(name for name in self.attacks if name in GRADIENT)

    def check_gradient(self, has_checkpoint: bool) -> None:
        """Raises ConfigError where an attack follows a gradient that there is not."""
        if self.gradient and not has_checkpoint:
            raise ConfigError(
                f"{', '.join(self.gradient)} follow a gradient, which model files do not have: give the checkpoint "
                "that they were made from, --checkpoint best.pt, or ask for --attacks square,noise"
            )
