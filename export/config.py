"""`ExportConfig`: settings of an export and of its verification."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from calib.config import CalibrationConfig
from runtime.engine.options import BuildOptions
from runtime.errors import ConfigError, DataError
from runtime.spec import ImageSizes
from train.recipes import MAIN

__all__ = ["PRECISIONS", "EngineConfig", "ExportConfig"]

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
"""Precisions of ONNX files and engines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The engine that is built from the last ONNX file; see `runtime.build`."""

    batch: tuple[int, int, int] = (1, 8, 32)
    """Smallest, optimal and largest batch size."""
    sm: tuple[int, ...] = ()
    """Target compute capabilities, e.g. (86, 89)."""
    flavor: str = "auto"
    """`tensorrt`, `tensorrt_rtx` or `auto`."""
    options: BuildOptions = field(default_factory=BuildOptions)
    """All other settings of the build."""
    cache: bool = False
    """Read and update the engine cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """Settings of an export. The defaults write `model.onnx` next to the checkpoint."""

    out: Path | None = None
    """Output folder (default: the checkpoint's folder, or NAME for `timm:NAME`)."""
    precision: str = "fp32"
    """Precision of the last ONNX file, from PRECISIONS. INT8 files compute the remaining nodes in
    FP16."""
    engine: EngineConfig | None = None
    """Engine to build from that file (default: no engine)."""

    arch: str | None = None
    """timm's name of the architecture, for a plain state dict."""
    weights: Path | None = None
    """File with the weights of `timm:NAME` (default: timm downloads them)."""
    route: str = MAIN
    """BatchNorm route to export."""
    ema: bool = True
    """Prefer the moving average of the weights, if the checkpoint has one."""
    data: Path | None = None
    """Folder of real images to verify on (default: the sample in the checkpoint, or images of
    `calib_data` that do not calibrate)."""

    input_form: str = "float32 NCHW"
    """Input of the files, one of `runtime.spec.INPUT_FORMS`."""
    output_form: str = "logits"
    """Output of the files, one of `runtime.spec.OUTPUT_FORMS`."""
    io: str = "fp32"
    """`fp16`: the FP16 file has FP16 inputs and outputs."""
    sizes: ImageSizes | None = None
    """Image size, if it differs from the checkpoint's. With a range, the files accept any size and
    the engine covers that range."""

    calib_data: Path | None = None
    """INT8: calibration images (a folder, tar or NumPy file), or the NAME.calib.json of an earlier
    run."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """INT8: settings of the calibration."""
    bisect: bool = True
    """If a file does not agree with the previous one, find the first layer that differs."""

    def __post_init__(self) -> None:
        for name in ("out", "weights", "data", "calib_data"):
            if isinstance(getattr(self, name), str):  # paths in Python programs are often text
                object.__setattr__(self, name, Path(getattr(self, name)))
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}; found {self.precision!r}")
        if self.io not in ("fp32", "fp16"):
            raise ConfigError(f"io must be fp32 or fp16; found {self.io!r}")
        if self.io == "fp16" and self.precision != "fp16":
            raise ConfigError(f"FP16 inputs and outputs require the precision fp16; found {self.precision}")
        if self.input_form == "float16 NCHW":
            raise ConfigError("only the FP16 file can have FP16 inputs: use io='fp16' (--io fp16)")
        self._check_int8()

    def _check_int8(self) -> None:
        int8 = self.precision == "int8"
        if int8 and self.calib_data is None:
            raise DataError(
                "INT8 needs calibration images: --calib-data DIR with a few hundred photos like those that the model "
                "will see"
            )
        if not int8 and self.calib_data is not None:
            raise ConfigError(f"calibration images require the precision int8; found {self.precision}")
        if self.calib_data is not None and not self.calib_data.exists():
            raise DataError(f"{self.calib_data}: no such folder of calibration images, or NAME.calib.json")
        if int8 and (self.input_form, self.output_form) != ("float32 NCHW", "logits"):
            raise ConfigError("INT8 files have float32 inputs and logits as output; remove --input and --output")
