"""`admit`: whether an engine may run here, decided before a byte of it reaches native code.

The order is: the sidecar, the plan's hash, what the plan may hold, the library and its version, the GPU. Each error
says what was found, what was expected, and the command that mends it.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
from dataclasses import dataclass
from pathlib import Path

from runtime.engine.flavors import RTX_DEFAULT_SMS, Flavor
from runtime.engine.sidecar import EngineInfo, read_sidecar
from runtime.errors import BackendUnavailable, ModelFileError, first_line
from runtime.system.gpu import Gpu, find_gpu

__all__ = ["Admitted", "admit", "check_gpu", "check_plan", "check_version", "rebuild_command"]

log = logging.getLogger(__name__)

_PRODUCTS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_PACKAGES = {"tensorrt": "'advprop[tensorrt]'", "tensorrt_rtx": "tensorrt-rtx"}
_RTX_ALL = (75, *RTX_DEFAULT_SMS)


@dataclass(frozen=True, slots=True)
class Admitted:
    """An engine that may run here."""

    plan: bytes
    """The very bytes that were compared with the hash."""
    info: EngineInfo
    """Its sidecar."""
    flavor: Flavor
    """The library that runs it."""
    gpu: Gpu
    """Where."""


def admit(path: Path, *, allow_host_code: bool) -> Admitted:
    """Decides whether an engine may run here.

    Args:
        path: the plan; its sidecar is beside it.
        allow_host_code: whether the plan may hold code for the CPU.

    Raises:
        ModelFileError: no sidecar, other bytes than were built, or an engine for another release or GPU.
        BackendUnavailable: the library, a GPU or its driver is missing; all that is missing is named.
    """
    info = read_sidecar(path)
    plan = path.read_bytes()
    check_plan(path, plan, info, allow_host_code=allow_host_code)
    missing = []
    try:
        flavor = Flavor(info.flavor, importlib.import_module(info.flavor))
    except (ImportError, OSError) as error:  # OSError: its native libraries did not load
        missing.append(
            f"{_PRODUCTS[info.flavor]} cannot be imported ({first_line(error)}): pip install {_PACKAGES[info.flavor]}"
        )
    else:
        check_version(path, info, flavor.version)
    gpu = find_gpu()
    if gpu is None:
        missing.append("no NVIDIA GPU or driver was found: load the ONNX file the engine was built from")
    if missing or gpu is None:
        raise BackendUnavailable(f"{path} cannot run here: {'; '.join(missing)}")
    check_gpu(path, info, gpu)
    return Admitted(plan, info, flavor, gpu)


def check_plan(path: Path, plan: bytes, info: EngineInfo, *, allow_host_code: bool) -> None:
    """Raises ModelFileError for other bytes than were built, and for what such a plan may not hold."""
    found = hashlib.sha256(plan).hexdigest()
    if found != info.plan_sha256:  # `read_sidecar` compared them too; the file may have changed since
        raise ModelFileError(
            f"{path} changed while it was read: found sha256 {found[:16]}…, expected {info.plan_sha256[:16]}…; load it "
            "again when it is written"
        )
    if info.has_host_code and not allow_host_code:
        raise ModelFileError(
            f"{path} is version-compatible, so it holds code that would run on the CPU. If you trust who built it, "
            "load it by EngineOptions(allow_host_code=True); or build one without: " + rebuild_command(path, info)
        )
    if "STRIP_PLAN" in info.flags:
        raise ModelFileError(
            f"{path} was built without its weights, and this version does not put them back; build it with them: "
            + rebuild_command(path, info)
        )


def check_version(path: Path, info: EngineInfo, found: str) -> None:
    """Raises ModelFileError where the installed release `found` does not run engines of `info`'s."""
    if found == info.version:
        return
    product = _PRODUCTS[info.flavor]
    if info.has_host_code and _numbers(found) > _numbers(info.version):
        return
    raise ModelFileError(
        f"{path} was built by another release of {product}: found {product} {found} here, expected {info.version}. "
        f"Build it again: {rebuild_command(path, info)}; or install {info.version}"
    )


def check_gpu(path: Path, info: EngineInfo, gpu: Gpu) -> None:
    """Raises ModelFileError where the engine is not for this GPU; warns where it is for a sibling."""
    here = f"{gpu.name} (SM {gpu.sm})"
    targets = info.compute_capabilities
    if f"sm_{gpu.sm}" in targets or (targets == ("default",) and gpu.sm in RTX_DEFAULT_SMS):
        if info.gpu and info.gpu != gpu.name:
            log.warning("%s was tuned on %s; on %s it runs, maybe slower than it could", path, info.gpu, gpu.name)
        return
    if "AMPERE_PLUS" in info.flags and gpu.sm >= 80:
        return
    built = ", ".join(f"SM {sm}" for sm in RTX_DEFAULT_SMS) if targets == ("default",) else ", ".join(targets)
    if info.flavor == "tensorrt_rtx" and gpu.sm not in _RTX_ALL:
        mend = "TensorRT-RTX has no kernels for it; pip install 'advprop[tensorrt]', then " + rebuild_command(
            path, info, builder="tensorrt"
        )
    else:
        mend = f"build it again: {rebuild_command(path, info, sm=gpu.sm)}"
    raise ModelFileError(f"{path} is for another GPU: found {here}, expected {built}; {mend}")


def rebuild_command(path: Path, info: EngineInfo, *, builder: str = "", sm: int = 0) -> str:
    """Returns the command that builds an engine like it, for this machine."""
    words = [f"advprop build MODEL.onnx --out {path} --builder {builder or info.flavor}"]
    if len(info.profiles) == 1 and len(info.profiles[0]) == 1:
        (shapes,) = info.profiles[0].values()
        words.append("--batch " + ":".join(str(shapes[name][0]) for name in ("min", "opt", "max")))
    if sm and info.flavor == "tensorrt_rtx":
        words.append(f"--sm {sm}")
    return " ".join(words)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
