"""`BuildOptions`: settings of an engine build, and which TensorRT version supports which option."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.engine.flavors import Flavor, check_targets, choose_flavor
from runtime.errors import ConfigError
from runtime.spec import ImageSizes
from runtime.system.gpu import find_gpu

if TYPE_CHECKING:
    import tensorrt

__all__ = [
    "HARDWARE_LEVELS",
    "HOST_CODE_FLAG",
    "BuildOptions",
    "apply_options",
    "check_options",
    "choose_builder",
    "flag_names",
]

log = logging.getLogger(__name__)

HARDWARE_LEVELS = ("ampere_plus", "same_compute_capability")
"""Values of `BuildOptions.hardware_compatible`, with TensorRT's names."""
HOST_CODE_FLAG = "VERSION_COMPATIBLE"
"""Builder flag of engines that contain code for the CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """Settings of an engine build. The defaults are TensorRT's."""

    precision: str | None = None
    """Expected precision: `fp32`, `fp16`, `bf16` or `int8`. The build fails unless at least half of
    the graph's weights have it."""
    image_sizes: ImageSizes | None = None
    """Image sizes of the engine; required if the ONNX file leaves them dynamic."""
    workspace_mib: int = 0
    """Maximum scratch memory of the builder and the engine, in MiB; 0 for TensorRT's own limit."""
    timing_cache: Path | None = None
    """Full TensorRT: file with kernel timings, which is read if it exists and written after the
    build."""
    version_compatible: bool = False
    """Full TensorRT: later versions can load the engine. It then contains code for the CPU and
    loads only if `engine_host_code_allowed` is set. Build and load such engines only if you trust
    their source."""
    hardware_compatible: str = ""
    """Full TensorRT: `ampere_plus` runs on all GPUs since Ampere, `same_compute_capability` on GPUs
    with the compute capability of this one. Both reduce the speed. Empty for this GPU only."""
    refit: bool = False
    """Build an engine whose weights can be replaced. Not for INT8, whose scales depend on the
    weights."""
    strip_weights: bool = False
    """Build a plan without weights, which must be refitted from the same ONNX file. Not for
    INT8."""

    def __post_init__(self) -> None:
        if self.workspace_mib < 0:
            raise ConfigError(f"workspace_mib must be a number of MiB, or 0 for no limit; found {self.workspace_mib}")
        if self.hardware_compatible not in ("", *HARDWARE_LEVELS):
            raise ConfigError(
                f"hardware_compatible must be one of {', '.join(HARDWARE_LEVELS)}; found {self.hardware_compatible!r}"
            )


def choose_builder(flavor: str, sms: tuple[int, ...], options: BuildOptions, *, quantized: bool) -> Flavor:
    """Choose the library that builds, and check that it supports the targets and options.

    Args:
        flavor: `auto`, `tensorrt` or `tensorrt_rtx`.
        sms: target compute capabilities; empty for the default.
        options: the requested options.
        quantized: whether the graph has Q/DQ nodes.

    Raises:
        BackendUnavailable: no suitable library is installed.
        ConfigError: the library does not support a target or option.
    """
    chosen = choose_flavor(flavor, sms)
    check_targets(chosen, sms)
    check_options(chosen, options, quantized=quantized)
    return chosen


def check_options(flavor: Flavor, options: BuildOptions, *, quantized: bool) -> None:
    """Check that `flavor` supports the options, and that they can be combined.

    Args:
        flavor: the library that builds.
        options: the requested options.
        quantized: whether the graph has Q/DQ nodes.

    Raises:
        ConfigError: an option is not supported; the message suggests an alternative.
    """
    refittable = options.refit or options.strip_weights
    if refittable and quantized:
        raise ConfigError(
            "an INT8 engine cannot be refitted: its scales were measured with its weights",
            fix="remove --refit and --strip-weights, or build FP16",
        )
    if flavor.name == "tensorrt_rtx":
        _check_rtx(flavor, options, refittable)
    elif options.hardware_compatible:
        supported = flavor.module.HardwareCompatibilityLevel.__members__
        if options.hardware_compatible.upper() not in supported:
            raise ConfigError(
                f"TensorRT {flavor.version} does not support {options.hardware_compatible}; it supports "
                f"{', '.join(name.lower() for name in supported if name != 'NONE')}"
            )
    if options.version_compatible:
        log.warning(
            "a version-compatible engine contains code that runs on the CPU; it loads only if engine_host_code_allowed "
            "is set, and should be loaded only if you trust its source"
        )


def _check_rtx(flavor: Flavor, options: BuildOptions, refittable: bool) -> None:
    name = f"TensorRT-RTX {flavor.version}"
    if options.version_compatible:
        raise ConfigError(
            f"{name} does not support version-compatible engines: each release needs its own engine",
            fix="remove --version-compatible, or build with full TensorRT",
        )
    if options.hardware_compatible:
        raise ConfigError(
            f"{name} does not support hardware compatibility levels",
            fix="name the GPU generations instead: --sm 86 --sm 89",
        )
    if refittable and find_gpu() is None:
        raise ConfigError(
            f"{name} needs a GPU and its driver to build refittable or weight-stripped engines, and no NVIDIA GPU was "
            "found",
            fix="remove --refit and --strip-weights",
        )


def flag_names(trt: Any, options: BuildOptions) -> tuple[str, ...]:
    """Return the names of the network's and builder's flags, for the sidecar and the cache key."""
    names = []
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        names.append("STRONGLY_TYPED")
    names += _builder_flags(options)
    if options.hardware_compatible:
        names.append(options.hardware_compatible.upper())
    if options.workspace_mib:
        names.append(f"WORKSPACE_{options.workspace_mib}_MIB")
    return tuple(names)


def apply_options(trt: Any, config: tensorrt.IBuilderConfig, options: BuildOptions) -> None:
    """Set options that `check_options` accepted in an `IBuilderConfig`."""
    for name in _builder_flags(options):
        config.set_flag(trt.BuilderFlag.__members__[name])
    if options.hardware_compatible:
        levels = trt.HardwareCompatibilityLevel.__members__
        config.hardware_compatibility_level = levels[options.hardware_compatible.upper()]
    if options.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)


def _builder_flags(options: BuildOptions) -> list[str]:
    flags = (
        (HOST_CODE_FLAG, options.version_compatible),
        ("REFIT", options.refit),
        ("STRIP_PLAN", options.strip_weights),
    )
    return [name for name, enabled in flags if enabled]
