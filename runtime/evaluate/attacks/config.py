"""`AttackConfig`: settings of a run of attacks."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.errors import ConfigError, nearest
from runtime.evaluate.attacks.target import radius_of
from runtime.spec import ModelSpec

__all__ = [
    "ATTACKS",
    "CLEAN",
    "GRADIENT",
    "INITIAL_SHARE",
    "NOISE",
    "SQUARE",
    "AttackConfig",
    "default_attacks",
    "default_epsilon",
]

CLEAN = "clean"
"""Name of the images without an attack; their ε is 0."""
NOISE, SQUARE = "noise", "square"
GRADIENT = ("pgd", "apgd")
"""Attacks that follow the gradient of a checkpoint; every model is evaluated on their images."""
ATTACKS = (*GRADIENT, SQUARE, NOISE)
"""All attacks, in the order in which they run and are reported."""

INITIAL_SHARE = 0.8
"""Default share of the pixels in Square attack's first squares, as in AutoAttack.

The paper uses 0.05 for ordinary ImageNet networks, 0.3 for some defenses and 0.8 for adversarially
trained networks."""

_SMALL_IMAGE = 64
"""Maximum input width, in pixels, of networks that are attacked with the usual ε for CIFAR."""


def default_attacks(has_checkpoint: bool) -> tuple[str, ...]:
    """Return the attacks that run by default."""
    return ATTACKS if has_checkpoint else (SQUARE, NOISE)


def default_epsilon(spec: ModelSpec) -> float:
    """Return the usual ε in 1/255: 4 as for ImageNet, or 8 as for CIFAR if images are small."""
    return 8.0 if max(spec.preprocessing.height, spec.preprocessing.width) <= _SMALL_IMAGE else 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackConfig:
    """Which attacks run and how strong they are. The result contains all of these settings."""

    attacks: tuple[str, ...]
    """Attacks to run, from ATTACKS."""
    epsilons: tuple[float, ...]
    """Values of ε, the maximum change of a pixel, in 1/255."""
    queries: int = 1000
    """Square attack: maximum number of queries per image."""
    initial_share: float = INITIAL_SHARE
    """Square attack: share of the pixels in the first squares."""
    draws: int = 10
    """Noise: draws per image; the worst one is reported."""
    steps: int = 20
    """PGD and APGD: gradient steps, for APGD with each of its losses."""
    restarts: int = 1
    """PGD and APGD: random starts, for APGD with each of its losses."""
    seed: int = 0
    """Seed of random starts, squares and noise."""

    def __post_init__(self) -> None:
        for name in self.attacks:
            if name not in ATTACKS:
                hint = nearest(name, ATTACKS) or f"expected one of {', '.join(ATTACKS)}"
                raise ConfigError(f"unknown attack {name!r}; {hint}")
        if not self.attacks or not self.epsilons:
            raise ConfigError(f"expected at least one attack and one ε; found {self.attacks} and {self.epsilons}")
        for field in ("queries", "draws", "steps", "restarts"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} must be at least 1; found {getattr(self, field)}")
        if not 0 < self.initial_share <= 1:
            raise ConfigError(f"initial_share must be above 0 and at most 1; found {self.initial_share}")
        for epsilon in self.epsilons:
            radius_of(epsilon)
        # Equal settings must compare equal, because a run resumes only with the same settings.
        object.__setattr__(self, "attacks", tuple(name for name in ATTACKS if name in self.attacks))
        object.__setattr__(self, "epsilons", tuple(sorted(set(self.epsilons))))

    @property
    def gradient(self) -> tuple[str, ...]:
        """The configured attacks that need a checkpoint."""
        return tuple(name for name in self.attacks if name in GRADIENT)

    def check_gradient(self, has_checkpoint: bool) -> None:
        """Raise ConfigError if an attack needs a checkpoint and none is available."""
        if self.gradient and not has_checkpoint:
            raise ConfigError(
                f"{', '.join(self.gradient)} need a gradient, which model files do not have: pass the checkpoint that "
                "the models were exported from, such as --checkpoint best.pt, or choose --attacks square,noise"
            )
