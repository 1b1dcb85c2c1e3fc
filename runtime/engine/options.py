"""What an engine build can be told beside the graph, and which TensorRT can do it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.engine.flavors import Flavor
from runtime.errors import ConfigError
from runtime.system.gpu import find_gpu

if TYPE_CHECKING:
    import tensorrt

__all__ = ["HARDWARE_LEVELS", "HOST_CODE_FLAG", "BuildOptions", "apply_options", "check_options", "flag_names"]

log = logging.getLogger(__name__)

HARDWARE_LEVELS = ("ampere_plus", "same_compute_capability")
"""What `BuildOptions.hardware_compatible` takes, as TensorRT names them."""
HOST_CODE_FLAG = "VERSION_COMPATIBLE"
"""Flag of engines that carry code for the CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How an engine is built; the defaults are TensorRT's."""

    workspace_mib: int = 0
    """Scratch memory that the builder and the engine may use, in MiB; 0 leaves it to TensorRT."""
    version_compatible: bool = False
    """Full TensorRT: the engine loads in later versions too. It then carries code for the CPU, and loads only where
    `engine_host_code_allowed` is set: build and load such engines only where you trust their source."""
    hardware_compatible: str = ""
    """Full TensorRT: `ampere_plus` runs on every GPU from Ampere on, `same_compute_capability` on those like the one
    at hand; both cost speed. Empty for the GPU at hand only."""
    refit: bool = False
    """The engine's weights can be replaced. Not for INT8: scales and weights belong together."""
    strip_weights: bool = False
    """The plan has no weights; whoever loads it refits it from the same ONNX file. Not for INT8."""

    def __post_init__(self) -> None:
        if self.workspace_mib < 0:
            raise ConfigError(f"the workspace is a number of MiB, 0 for no limit; found {self.workspace_mib}")
        if self.hardware_compatible not in ("", *HARDWARE_LEVELS):
            raise ConfigError(
                f"hardware_compatible is one of {', '.join(HARDWARE_LEVELS)}; found {self.hardware_compatible!r}"
            )


def check_options(flavor: Flavor, options: BuildOptions, *, quantized: bool) -> None:
    """Refuses what `flavor` cannot do, and what does not go together.

    Args:
        flavor: the library that builds.
        options: what was asked for.
        quantized: whether the graph has Q/DQ nodes.

    Raises:
        ConfigError: the message says what to do instead.
    """
    refittable = options.refit or options.strip_weights
    if refittable and quantized:
        raise ConfigError(
            "an INT8 engine cannot be refitted: its scales were measured with the weights it has. Leave --refit and "
            "--strip-weights out, or build FP16"
        )
    if flavor.name == "tensorrt_rtx":
        _check_rtx(flavor, options, refittable)
    elif options.hardware_compatible:
        known = flavor.module.HardwareCompatibilityLevel.__members__
        if options.hardware_compatible.upper() not in known:
            raise ConfigError(
                f"TensorRT {flavor.version} has no {options.hardware_compatible}; it has "
                f"{', '.join(name.lower() for name in known if name != 'NONE')}"
            )
    if options.version_compatible:
        log.warning(
            "a version-compatible engine carries code that runs on the CPU; it loads only where that is allowed "
            "(engine_host_code_allowed), so load it only from people you trust"
        )


def _check_rtx(flavor: Flavor, options: BuildOptions, refittable: bool) -> None:
    name = f"TensorRT-RTX {flavor.version}"
    if options.version_compatible:
        raise ConfigError(
            f"{name} has no version-compatible engines: each release needs its own. Leave --version-compatible out, "
            "or build with full TensorRT"
        )
    if options.hardware_compatible:
        raise ConfigError(
            f"{name} has no hardware compatibility levels: name the GPU generations instead, --sm 86 --sm 89"
        )
    if refittable and find_gpu() is None:
        raise ConfigError(
            f"{name} needs a GPU and its driver to build refittable or weight-stripped engines, and no NVIDIA GPU was "
            "found; leave --refit and --strip-weights out"
        )


def flag_names(trt: Any, options: BuildOptions) -> tuple[str, ...]:
    """Returns what `apply_options` and the network's flags come to, as the sidecar and the cache's key name it."""
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
    """Sets `options`, which `check_options` let pass, in an `IBuilderConfig`."""
    for name in _builder_flags(options):
        config.set_flag(trt.BuilderFlag.__members__[name])
    if options.hardware_compatible:
        levels = trt.HardwareCompatibilityLevel.__members__
        config.hardware_compatibility_level = levels[options.hardware_compatible.upper()]
    if options.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)


def _builder_flags(options: BuildOptions) -> list[str]:
    wanted = (
        (HOST_CODE_FLAG, options.version_compatible),
        ("REFIT", options.refit),
        ("STRIP_PLAN", options.strip_weights),
    )
    return [name for name, asked in wanted if asked]
