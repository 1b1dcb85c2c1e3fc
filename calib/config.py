"""What can be wished of a calibration."""

from __future__ import annotations

from dataclasses import dataclass

from calib.thresholds import METHODS
from runtime.errors import ConfigError

__all__ = ["KINDS_LEFT", "METHOD_NAMES", "CalibrationConfig"]

KINDS_LEFT = ("depthwise", "gates", "first", "last")
"""Kinds of layers that can be left out: depthwise convolutions, the layers of squeeze-and-excitation and other gates
(they see one number a channel), the first convolution, the last matrix product."""

METHOD_NAMES = ("auto", *METHODS)
"""How thresholds can be chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """How a classifier is quantized."""

    images: int = 256
    """The most images to take from a folder, tar or array for thresholds."""
    method: str = "auto"
    """One of METHOD_NAMES. `auto`: for each tensor, of several thresholds from the one of least squared error to
    the largest magnitude, that whose layers' outputs come out nearest."""
    correct_bias: bool = True
    """Take the mean error of each output channel off its bias."""
    equalize: bool = False
    """Move range between the channels of an activation and the weights that read it, where that is exact."""
    reconstruct: bool = False
    """Learn how each weight is rounded (AdaRound)."""
    budget: float | None = None
    """Points of top-1 accuracy that INT8 may cost on held-out images: layers go back to floating point until
    it holds. None: no images are held out."""
    mix: tuple[str, ...] = ("clean",)
    """What each image is used as: `calib.images.KINDS`."""
    keep: tuple[str, ...] = ()
    """Names of nodes that stay in floating point."""
    leave: tuple[str, ...] = ()
    """Kinds of layers that stay in floating point, of KINDS_LEFT."""
    residuals: bool = False
    """Quantize the other input of each Add behind a quantized convolution, so that TensorRT can do both at once."""
    half: bool = True
    """Make everything FP16 that is not INT8."""
    seed: int = 0
    """Of the corruptions in the mix, and of the images a reconstruction step takes."""

    def __post_init__(self) -> None:
        if self.method not in METHOD_NAMES:
            raise ConfigError(f"method must be {', '.join(METHOD_NAMES)}; found {self.method!r}")
        for kind in self.leave:
            if kind not in KINDS_LEFT:
                raise ConfigError(f"layers can be left out by {', '.join(KINDS_LEFT)}; found {kind!r}")
        if self.images < 1:
            raise ConfigError(f"images must be at least 1; found {self.images}")
        if self.budget is not None and not 0 <= self.budget <= 100:
            raise ConfigError(f"a budget is in points of top-1 accuracy, 0 to 100; found {self.budget}")
