"""Command-line options of a calibration, for `advprop calibrate` and `advprop-export --trt int8`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from calib.config import METHOD_NAMES, CalibrationConfig

__all__ = ["OPTION_NAMES", "calibration_config", "calibration_options"]

_Command = TypeVar("_Command", bound=Callable[..., Any])
_DEFAULTS = CalibrationConfig()

OPTION_NAMES = (
    *("calib_images", "calib_mix", "method", "bias_correction", "equalize", "reconstruct"),
    *("budget", "keep", "leave", "residuals", "rest", "calib_seed"),
)
"""What the options are called in a command's parameters."""


def calibration_options(command: _Command) -> _Command:
    """Adds the options that make a CalibrationConfig."""
    options = (
        click.option(
            "--calib-images",
            "--images",
            default=_DEFAULTS.images,
            show_default=True,
            type=click.IntRange(min=1),
            metavar="N",
            help="Calibration images to take of a folder.",
        ),
        click.option(
            "--calib-mix",
            "--mix",
            default=",".join(_DEFAULTS.mix),
            show_default=True,
            metavar="KINDS",
            help="What each is used as: clean,corrupted,adversarial.",
        ),
        click.option(
            "--method",
            default=_DEFAULTS.method,
            show_default=True,
            type=click.Choice(METHOD_NAMES),
            help="How thresholds are chosen; auto tries several for each tensor.",
        ),
        click.option(
            "--bias-correction/--no-bias-correction",
            default=_DEFAULTS.correct_bias,
            show_default=True,
            help="Take the mean error of each channel off its bias.",
        ),
        click.option(
            "--equalize/--no-equalize",
            "--equalise/--no-equalise",  # how version 0.1 spelled it
            default=_DEFAULTS.equalize,
            show_default=True,
            help="Move range from activations to weights where that is exact.",
        ),
        click.option("--reconstruct", is_flag=True, help="Learn how weights are rounded (AdaRound): minutes."),
        click.option(
            "--budget",
            type=click.FloatRange(0, 100),
            metavar="POINTS",
            help="Top-1 that INT8 may cost on held-out images; layers go back to FP16 until it holds.",
        ),
        click.option("--keep", multiple=True, metavar="NODE", help="Keep this node in floating point. Repeatable."),
        click.option(
            "--leave",
            default="",
            metavar="KINDS",
            help="Kinds of layers to keep in floating point: depthwise,gates,first,last.",
        ),
        click.option(
            "--residuals/--no-residuals",
            default=_DEFAULTS.residuals,
            show_default=True,
            help="Quantize what residual Adds read too, so that TensorRT can fuse them.",
        ),
        click.option(
            "--rest",
            default="fp16",
            show_default=True,
            type=click.Choice(["fp16", "fp32"]),
            help="Precision of everything that is not INT8.",
        ),
        click.option("--calib-seed", default=0, show_default=True, help="Seed of the mix's corruptions."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def calibration_config(given: dict[str, Any]) -> CalibrationConfig:
    """Returns what a command's parameters, OPTION_NAMES, ask for. Raises ConfigError."""
    return CalibrationConfig(
        images=given["calib_images"],
        method=given["method"],
        correct_bias=given["bias_correction"],
        equalize=given["equalize"],
        reconstruct=given["reconstruct"],
        budget=given["budget"],
        mix=_words(given["calib_mix"]),
        keep=given["keep"],
        leave=_words(given["leave"]),
        residuals=given["residuals"],
        half=given["rest"] == "fp16",
        seed=given["calib_seed"],
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
