"""`CalibrationConfig`: settings of a calibration."""

from __future__ import annotations

from dataclasses import dataclass

from calib.thresholds import METHODS
from runtime.errors import ConfigError

__all__ = ["LAYER_KINDS", "METHOD_NAMES", "CalibrationConfig"]

LAYER_KINDS = ("depthwise", "gates", "first", "last")
"""Kinds of layers that can be kept in floating point: depthwise convolutions; the layers of
squeeze-and-excitation and other gates, whose input has one value per channel; the first layer; the
last layer."""

METHOD_NAMES = ("auto", *METHODS)
"""Methods of choosing the clipping thresholds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """Settings for the quantization of a classifier to INT8.

    Raises:
        ConfigError: a value is not valid.
    """

    images: int = 256
    """Maximum number of calibration images to take from a folder, tar file or array."""
    method: str = "auto"
    """Method that chooses clipping thresholds, from METHOD_NAMES. `auto` tries several thresholds
    per tensor, from the one with the smallest squared error to the largest magnitude. It picks the
    threshold that minimizes the output error of the layers that read the tensor."""
    correct_bias: bool = True
    """Subtract the mean quantization error of each output channel from its bias."""
    equalize: bool = False
    """Rescale the channels of activations and, inversely, the weights that read them, if that is
    exact."""
    reconstruct: bool = False
    """Learn whether each weight is rounded up or down (AdaRound)."""
    max_noise: float = 1.0
    """Maximum INT8 error of a layer: the squared error of its output in percent of the squared output,
    with everything before the layer exact. Layers above it are kept in floating point. Applies if
    layer errors are measured: with `method="auto"` or `correct_bias`."""
    budget: float | None = None
    """Maximum loss of top-1 accuracy on held-out images, in percentage points (default: no limit,
    and no images are held out). Layers are kept in floating point until the loss is within the
    budget."""
    mix: tuple[str, ...] = ("clean",)
    """Variants of each image to calibrate on; see `calib.images.KINDS`."""
    keep: tuple[str, ...] = ()
    """Names of nodes to keep in floating point."""
    leave: tuple[str, ...] = ()
    """Kinds of layers to keep in floating point, from LAYER_KINDS."""
    residuals: bool = False
    """Also quantize the second input of each Add that follows a quantized convolution, which lets
    TensorRT fuse the two."""
    half: bool = True
    """Convert everything that is not INT8 to FP16."""
    seed: int = 0
    """Seed of the corruptions in the mix and of the image order in reconstruction."""

    def __post_init__(self) -> None:
        if self.method not in METHOD_NAMES:
            raise ConfigError(f"method must be one of {', '.join(METHOD_NAMES)}; found {self.method!r}")
        for kind in self.leave:
            if kind not in LAYER_KINDS:
                raise ConfigError(f"expected kinds of layers from {', '.join(LAYER_KINDS)}; found {kind!r}")
        if self.images < 1:
            raise ConfigError(f"images must be at least 1; found {self.images}")
        if not self.max_noise > 0:
            raise ConfigError(f"max_noise must be above 0 percent; found {self.max_noise}")
        if self.budget is not None and not 0 <= self.budget <= 100:
            raise ConfigError(f"budget must be 0 to 100 percentage points of top-1 accuracy; found {self.budget}")
