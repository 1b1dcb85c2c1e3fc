"""Options for CalibrationConfig, shared by `advprop calibrate` and `advprop-export`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from calib.config import METHOD_NAMES, CalibrationConfig
from runtime.system.command import CommaList, Option, as_config

__all__ = ["CALIBRATION_OPTIONS", "calibration_options"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_DEFAULTS = CalibrationConfig()


def _option(*names: str, **attributes: Any) -> Option:
    return Option(list(names), group="INT8 calibration", **attributes)


CALIBRATION_OPTIONS = (
    _option(
        "--calib-images",
        former=["--images"],
        default=_DEFAULTS.images,
        show_default=True,
        type=click.IntRange(min=1),
        metavar="N",
        help="Maximum number of calibration images.",
    ),
    _option(
        "--calib-mix",
        former=["--mix"],
        default=",".join(_DEFAULTS.mix),
        show_default=True,
        type=CommaList(str),
        metavar="KINDS",
        help="Variants of each image to calibrate on: clean, corrupted, adversarial.",
    ),
    _option(
        "--method",
        default=_DEFAULTS.method,
        show_default=True,
        type=click.Choice(METHOD_NAMES),
        help="Method that chooses calibration thresholds (amax); auto tries several per tensor.",
    ),
    _option(
        "--bias-correction/--no-bias-correction",
        default=_DEFAULTS.correct_bias,
        show_default=True,
        help="Correct biases for the mean quantization error.",
    ),
    _option(
        "--equalize/--no-equalize",
        former=["--equalise/--no-equalise"],
        default=_DEFAULTS.equalize,
        show_default=True,
        help="Move range from activations to weights, if that does not change the network's output.",
    ),
    _option("--reconstruct", is_flag=True, help="Learn how to round weights (AdaRound). Takes minutes."),
    _option(
        "--max-noise",
        default=_DEFAULTS.max_noise,
        show_default=True,
        type=click.FloatRange(0, min_open=True),
        metavar="PERCENT",
        help="Maximum squared INT8 error of a layer, in percent of its squared output. Layers above it are kept in "
        "FP16. 100 keeps none.",
    ),
    _option(
        "--budget",
        type=click.FloatRange(0, 100),
        metavar="POINTS",
        help="Maximum loss of top-1 accuracy on held-out images, in percentage points. Layers are kept in FP16 "
        "until the loss is within it.",
    ),
    _option("--keep", multiple=True, metavar="NODE", help="Node to keep in floating point. Repeatable."),
    _option(
        "--leave",
        default="",
        type=CommaList(str),
        metavar="KINDS",
        help="Kinds of layers to keep in floating point: depthwise, gates, first, last.",
    ),
    _option(
        "--residuals/--no-residuals",
        default=_DEFAULTS.residuals,
        show_default=True,
        help="Quantize the inputs of residual additions too, which lets TensorRT fuse them.",
    ),
    _option(
        "--rest",
        default="fp16",
        show_default=True,
        type=click.Choice(["fp16", "fp32"]),
        help="Precision of everything that is not INT8.",
    ),
    _option(
        "--seed",
        former=["--calib-seed"],
        default=0,
        show_default=True,
        help="Seed for the corruptions of --calib-mix and for --reconstruct.",
    ),
)


def _config(given: dict[str, Any]) -> CalibrationConfig:
    return CalibrationConfig(
        images=given["calib_images"],
        method=given["method"],
        correct_bias=given["bias_correction"],
        equalize=given["equalize"],
        reconstruct=given["reconstruct"],
        max_noise=given["max_noise"],
        budget=given["budget"],
        mix=given["calib_mix"],
        keep=given["keep"],
        leave=given["leave"],
        residuals=given["residuals"],
        half=given["rest"] == "fp16",
        seed=given["seed"],
    )


def calibration_options(function: _Function) -> _Function:
    """Add CALIBRATION_OPTIONS to a command, which receives a CalibrationConfig as `calibration`."""
    return as_config("calibration", CALIBRATION_OPTIONS, _config)(function)
