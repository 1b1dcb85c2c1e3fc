"""TensorRT 10, TensorRT 11 and TensorRT-RTX, with the calls that they share."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.engine.layers import LISTING
from runtime.errors import BackendUnavailable, ConfigError, first_line
from runtime.system.gpu import find_gpu

__all__ = [
    "RTX_DEFAULT_SMS",
    "Flavor",
    "check_targets",
    "choose_flavor",
    "describe_targets",
    "native_logger",
    "parse_sm",
]

log = logging.getLogger(__name__)

RTX_DEFAULT_SMS = (80, 86, 89, 120, 121)
"""TensorRT-RTX's default targets: Ampere, Ada, and Blackwell's consumer GPUs."""
_FLAVORS = ("tensorrt", "tensorrt_rtx")
_OLDEST_TENSORRT = 10  # the first version with strongly typed networks

_INSTALL_FIX = (
    "to build engines, install one of:\n"
    "  pip install tensorrt-rtx            for SM 75-89 and 12x, on x86-64 Linux or Windows, without a GPU\n"
    "  pip install tensorrt cuda-bindings  for any NVIDIA GPU (H100, B200, …), on a machine with that GPU"
)


@dataclass(frozen=True, slots=True)
class Flavor:
    """One imported TensorRT library."""

    name: str
    """`tensorrt` or `tensorrt_rtx`."""
    module: Any
    """The imported module."""

    @property
    def version(self) -> str:
        """The library's full version, e.g. `1.7.1.116`."""
        return str(self.module.__version__)


def parse_sm(text: str) -> int:
    """Parse a compute capability: `89`, `8.9`, `sm89` or `sm_89` → 89.

    Raises:
        ConfigError: the text has another format.
    """
    digits = text.lower().removeprefix("sm").removeprefix("_").replace(".", "")
    if not digits.isdigit() or not 50 <= int(digits) <= 999:
        raise ConfigError(f"--sm takes a compute capability such as 86, 8.9 or sm_120; found {text!r}")
    return int(digits)


def describe_targets(capabilities: Sequence[str]) -> str:
    """Return the GPU generations of an engine's sidecar for people, such as "SM 86, 89".

    Args:
        capabilities: names such as `sm_86`, or `default` for RTX_DEFAULT_SMS.
    """
    defaults = [str(sm) for sm in RTX_DEFAULT_SMS]
    names = [sm for name in capabilities for sm in (defaults if name == "default" else [name.removeprefix("sm_")])]
    return f"SM {', '.join(names)}"


def choose_flavor(name: str, sms: tuple[int, ...]) -> Flavor:
    """Choose the library that builds: full TensorRT for this machine's GPU, otherwise TensorRT-RTX.

    Args:
        name: `auto`, `tensorrt` or `tensorrt_rtx`.
        sms: requested compute capabilities, e.g. (86, 89); empty for the default.

    Raises:
        BackendUnavailable: no suitable library is installed; the message lists what to install.
        ConfigError: the name is unknown.
    """
    if name not in ("auto", *_FLAVORS):
        raise ConfigError(f"flavor must be auto, tensorrt or tensorrt_rtx; found {name!r}")
    problems = []
    if name != "tensorrt_rtx":
        flavor, problem = _full_tensorrt(sms)
        if flavor:
            return flavor
        problems.append(problem)
    if name != "tensorrt":
        flavor, problem = import_flavor("tensorrt_rtx")
        if flavor:
            return flavor
        problems.append(problem)
    reason = "; ".join(problems)
    raise BackendUnavailable(f"no engine builder is available: {reason}", reason=reason, fix=_INSTALL_FIX)


def check_targets(flavor: Flavor, sms: tuple[int, ...]) -> None:
    """Raise ConfigError if `flavor` does not support one of the compute capabilities `sms`."""
    if flavor.name != "tensorrt_rtx":
        return
    supported = [name for name in flavor.module.ComputeCapability.__members__ if name.startswith("SM")]
    for sm in sms:
        if f"SM{sm}" not in supported:
            raise ConfigError(
                f"TensorRT-RTX {flavor.version} does not support SM {sm}; it supports {', '.join(supported)}",
                fix="for data-center GPUs (SM 90, 100), use full TensorRT on a machine with that GPU",
            )


def _full_tensorrt(sms: tuple[int, ...]) -> tuple[Flavor | None, str]:
    """Return full TensorRT, or None and what is missing."""
    gpu = find_gpu()
    if gpu is None:
        return None, "full TensorRT builds only for the GPU of this machine, and no NVIDIA GPU was found"
    if any(sm != gpu.sm for sm in sms):
        return None, f"full TensorRT builds only for the GPU of this machine, {gpu.name} (SM {gpu.sm})"
    flavor, problem = import_flavor("tensorrt")
    if flavor and int(flavor.version.split(".")[0]) < _OLDEST_TENSORRT:
        return None, (
            f"TensorRT {flavor.version} has no strongly typed networks (added in {_OLDEST_TENSORRT}) and could "
            "silently build FP32"
        )
    return flavor, problem


def import_flavor(name: str) -> tuple[Flavor | None, str]:
    """Return the library called `name`, or None and the reason why it cannot be imported."""
    try:
        module = importlib.import_module(name)
        if not hasattr(module, "Builder"):  # a folder with that name, e.g. with type stubs
            return None, f"{name} is not installed; its name refers to {list(module.__path__)}"
        return Flavor(name, module), ""
    except (ImportError, OSError) as error:  # OSError: the native libraries did not load
        return None, f"{name} cannot be imported ({first_line(error)})"


@functools.cache
def native_logger(flavor: Flavor) -> Any:
    """Return the library's logger, which forwards to `logging`. Each process has one.

    `errors` collects the native errors. `seen` holds the forwarded messages, because TensorRT-RTX
    repeats some for every convolution. `listing` is the list of layers of a build. Call `reset`
    before a build.
    """
    trt = flavor.module
    levels = {
        trt.ILogger.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.ERROR: logging.ERROR,
        trt.ILogger.WARNING: logging.WARNING,
        trt.ILogger.INFO: logging.DEBUG,
        trt.ILogger.VERBOSE: logging.DEBUG,
    }

    class ForwardingLogger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.reset()

        def reset(self) -> None:
            self.errors: list[str] = []
            self.seen: set[str] = set()
            self.listing = ""

        def log(self, severity: Any, message: str) -> None:
            if message.startswith(LISTING):
                self.listing = message  # one line per kernel: for the INT8 report, not for the console
                return
            level = levels.get(severity, logging.DEBUG)
            if level == logging.ERROR:
                # The caller raises an error with this text, so it is not logged as well.
                self.errors.append(message)
                level = logging.DEBUG
            if message not in self.seen:
                self.seen.add(message)
                log.log(level, "%s: %s", flavor.name, message)

    return ForwardingLogger()
