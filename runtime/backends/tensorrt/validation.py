"""`validate_engine`: check that an engine can run here, before any of its bytes reach native code.

The order is: the sidecar, the plan's hash, the plan's flags, the library and its version, the GPU.
Each error states what was found, what was expected, and the command that fixes it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runtime.engine.flavors import RTX_DEFAULT_SMS, Flavor, describe_targets, import_flavor
from runtime.engine.sidecar import EngineInfo, read_sidecar
from runtime.errors import BackendUnavailable, ModelFileError
from runtime.system.gpu import Gpu, find_gpu

__all__ = ["ValidatedEngine", "check_gpu", "check_plan", "check_version", "rebuild_command", "validate_engine"]

log = logging.getLogger(__name__)

_PRODUCTS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_PACKAGES = {"tensorrt": "tensorrt cuda-bindings", "tensorrt_rtx": "tensorrt-rtx"}
_RTX_ALL_SMS = (75, *RTX_DEFAULT_SMS)


@dataclass(frozen=True, slots=True)
class ValidatedEngine:
    """An engine that can run on this machine."""

    plan: bytes
    """The plan: exactly the bytes that were hashed."""
    info: EngineInfo
    """Its sidecar."""
    flavor: Flavor
    """The library that runs it."""
    gpu: Gpu
    """The GPU that runs it."""


def validate_engine(
    path: Path, *, allow_host_code: bool, detect_gpu: Callable[[], Gpu | None] = find_gpu
) -> ValidatedEngine:
    """Check that an engine can run here, and read it.

    Args:
        path: the plan, next to its sidecar.
        allow_host_code: whether the plan may contain code for the CPU.
        detect_gpu: returns the GPU of this machine.

    Raises:
        ModelFileError: there is no sidecar, the bytes changed since the build, or the engine is for
            another release or GPU.
        BackendUnavailable: the library, a GPU or its driver is missing; the message lists all that
            is missing.
    """
    info = read_sidecar(path)
    plan = path.read_bytes()
    check_plan(path, plan, info, allow_host_code=allow_host_code)
    missing = []
    flavor, problem = import_flavor(info.flavor)
    if flavor:
        check_version(path, info, flavor.version)
    else:
        missing.append(f"{_PRODUCTS[info.flavor]}: {problem}; install it: pip install {_PACKAGES[info.flavor]}")
    gpu = detect_gpu()
    if gpu is None:
        missing.append("no NVIDIA GPU or driver was found: load the ONNX file that the engine was built from")
    if flavor is None or gpu is None:
        raise BackendUnavailable(f"{path} cannot run here: {'; '.join(missing)}")
    check_gpu(path, info, gpu)
    return ValidatedEngine(plan, info, flavor, gpu)


def check_plan(path: Path, plan: bytes, info: EngineInfo, *, allow_host_code: bool) -> None:
    """Raise ModelFileError if the plan changed since the build, or its flags are not allowed."""
    found = hashlib.sha256(plan).hexdigest()
    if found != info.plan_sha256:  # checked again: the file may change after `read_sidecar`
        raise ModelFileError(
            f"{path} changed while it was read: found sha256 {found[:16]}…, expected {info.plan_sha256[:16]}…",
            fix="load it again once it is written",
        )
    if info.has_host_code and not allow_host_code:
        raise ModelFileError(
            f"{path} is version-compatible, and therefore contains code that would run on the CPU",
            fix="if you trust its source, load it with EngineOptions(allow_host_code=True); otherwise build an engine "
            "without host code: " + rebuild_command(path, info),
        )
    if "STRIP_PLAN" in info.flags:
        raise ModelFileError(
            f"{path} was built without its weights, and this version cannot refit them",
            fix="build it with its weights: " + rebuild_command(path, info),
        )


def check_version(path: Path, info: EngineInfo, found: str) -> None:
    """Raise ModelFileError if the installed release `found` cannot run the engine."""
    if found == info.version:
        return
    product = _PRODUCTS[info.flavor]
    if info.has_host_code and _numbers(found) > _numbers(info.version):
        return
    raise ModelFileError(
        f"{path} was built by another release of {product}: found {product} {found} here, expected {info.version}",
        fix=f"build it again: {rebuild_command(path, info)}; or install {product} {info.version}",
    )


def check_gpu(path: Path, info: EngineInfo, gpu: Gpu) -> None:
    """Raise ModelFileError for another GPU generation, and warn about another GPU of the same."""
    targets = info.compute_capabilities
    if f"sm_{gpu.sm}" in targets or (targets == ("default",) and gpu.sm in RTX_DEFAULT_SMS):
        if info.gpu and info.gpu != gpu.name:
            log.warning("%s was tuned on %s; it may run slower on %s", path, info.gpu, gpu.name)
        return
    if "AMPERE_PLUS" in info.flags and gpu.sm >= 80:
        return
    built = describe_targets(targets)
    if info.flavor == "tensorrt_rtx" and gpu.sm not in _RTX_ALL_SMS:
        fix = (
            "TensorRT-RTX has no kernels for this GPU: pip install tensorrt cuda-bindings, then "
            f"{rebuild_command(path, info, builder='tensorrt')}"
        )
    else:
        fix = f"build it again: {rebuild_command(path, info, sm=gpu.sm)}"
    raise ModelFileError(f"{path} is for another GPU: found {gpu.name} (SM {gpu.sm}), expected {built}", fix=fix)


def rebuild_command(path: Path, info: EngineInfo, *, builder: str = "", sm: int = 0) -> str:
    """Return the command that builds the same engine for this machine."""
    words = [f"advprop build MODEL.onnx --out {path} --builder {builder or info.flavor}"]
    if len(info.profiles) == 1 and len(info.profiles[0]) == 1:
        (shapes,) = info.profiles[0].values()
        words.append("--batch " + ":".join(str(shapes[name][0]) for name in ("min", "opt", "max")))
    if sm and info.flavor == "tensorrt_rtx":
        words.append(f"--sm {sm}")
    return " ".join(words)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
