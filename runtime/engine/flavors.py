"""TensorRT 10, TensorRT 11 and TensorRT-RTX, behind the calls they have in common."""

from __future__ import annotations

import functools
import importlib
import logging
from dataclasses import dataclass
from typing import Any

from runtime.engine.layers import LISTING
from runtime.errors import BackendUnavailable, ConfigError
from runtime.system.gpu import find_gpu

__all__ = ["RTX_DEFAULT_SMS", "Flavor", "check_targets", "choose_flavor", "native_logger", "parse_sm"]

log = logging.getLogger(__name__)

RTX_DEFAULT_SMS = (80, 86, 89, 120, 121)
"""TensorRT-RTX's own choice of targets: Ampere to Ada, and Blackwell's consumer GPUs."""
_FLAVORS = ("tensorrt", "tensorrt_rtx")
_OLDEST_TENSORRT = 10  # before it there are no strongly typed networks

INSTALL_HELP = (
    "To build engines, install one of:\n"
    "  pip install tensorrt-rtx         any x86-64 Linux or Windows machine, GPU or not; for SM 75-89, 12x\n"
    "  pip install 'advprop[tensorrt]'  a machine with the NVIDIA GPU the engine is for (H100, B200, …)"
)


@dataclass(frozen=True, slots=True)
class Flavor:
    """One importable TensorRT library."""

    name: str
    """`tensorrt` or `tensorrt_rtx`."""
    module: Any
    """The imported module."""

    @property
    def version(self) -> str:
        """The library's full version, e.g. `1.7.1.116`."""
        return str(self.module.__version__)


def parse_sm(text: str) -> int:
    """Reads a compute capability: `89`, `8.9`, `sm89` or `sm_89` → 89.

    Raises:
        ConfigError: anything else.
    """
    digits = text.lower().removeprefix("sm").removeprefix("_").replace(".", "")
    if not digits.isdigit() or not 50 <= int(digits) <= 999:
        raise ConfigError(f"--sm takes a compute capability such as 86, 8.9 or sm_120; found {text!r}")
    return int(digits)


def choose_flavor(name: str, sms: tuple[int, ...]) -> Flavor:
    """Picks the library that builds: full TensorRT for the GPU at hand, else TensorRT-RTX.

    Args:
        name: `auto`, `tensorrt` or `tensorrt_rtx`.
        sms: compute capabilities asked for, e.g. (86, 89); empty for the default.

    Raises:
        BackendUnavailable: no library that fits is installed; the message says what to install.
        ConfigError: an unknown name.
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
        flavor, problem = _import("tensorrt_rtx")
        if flavor:
            return flavor
        problems.append(problem)
    raise BackendUnavailable("no engine builder can be used here: " + "; ".join(problems) + ".\n" + INSTALL_HELP)


def check_targets(flavor: Flavor, sms: tuple[int, ...]) -> None:
    """Raises ConfigError where `flavor` has no kernels for one of `sms`."""
    if flavor.name != "tensorrt_rtx":
        return
    known = [name for name in flavor.module.ComputeCapability.__members__ if name.startswith("SM")]
    for sm in sms:
        if f"SM{sm}" not in known:
            raise ConfigError(
                f"TensorRT-RTX {flavor.version} does not build for SM {sm}; it has {', '.join(known)}. "
                "Data-center GPUs (SM 90, 100) need full TensorRT on a machine with that GPU"
            )


def _full_tensorrt(sms: tuple[int, ...]) -> tuple[Flavor | None, str]:
    gpu = find_gpu()
    if gpu is None:
        return None, "full TensorRT builds only on the GPU it is for, and no NVIDIA GPU was found"
    here = gpu.sm
    if any(sm != here for sm in sms):
        return None, f"full TensorRT builds only for the GPU at hand, {gpu.name} (SM {here})"
    flavor, problem = _import("tensorrt")
    if flavor and int(flavor.version.split(".")[0]) < _OLDEST_TENSORRT:
        return None, (
            f"TensorRT {flavor.version} has no strongly typed networks (they came with "
            f"{_OLDEST_TENSORRT}), so it might silently build FP32"
        )
    return flavor, problem


def _import(name: str) -> tuple[Flavor | None, str]:
    try:
        module = importlib.import_module(name)
        if not hasattr(module, "Builder"):  # a folder of that name, such as that of type stubs
            return None, f"{name} is not installed; what is found under its name is {list(module.__path__)}"
        return Flavor(name, module), ""
    except (ImportError, OSError) as error:  # OSError: the native libraries did not load
        return None, f"{name} cannot be imported ({error})"


@functools.cache
def native_logger(flavor: Flavor) -> Any:
    """Returns the library's one logger (a process has one), which forwards to `logging`.

    Its list `errors` collects the texts of native errors, its set `seen` what was forwarded already (TensorRT-RTX
    says some things once a convolution), and `listing` the layers of a build that tells them. `reset` it before
    a build.
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
                self.listing = message  # a line a kernel: for us, not for the console
                return
            level = levels.get(severity, logging.DEBUG)
            if level == logging.ERROR:
                # The caller raises an error with this text; a second copy would be noise.
                self.errors.append(message)
                level = logging.DEBUG
            if message not in self.seen:
                self.seen.add(message)
                log.log(level, "%s: %s", flavor.name, message)

    return ForwardingLogger()
