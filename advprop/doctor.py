"""Check which parts of this machine work, why the others do not, and how to fix them."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from runtime.engine.flavors import RTX_DEFAULT_SMS, choose_flavor
from runtime.errors import BackendUnavailable, first_line
from runtime.system.cpu import has_exact_int8
from runtime.system.gpu import find_gpu
from runtime.system.slices import SLICES, missing_requirements, slice_command

__all__ = ["Finding", "check", "run_checks", "summarize"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one check."""

    part: str
    """The checked part of the machine."""
    state: Literal["ok", "missing", "broken"]
    """`missing`: the part is absent; `broken`: it is installed but does not work."""
    found: str
    """Version, device or problem."""
    fix: str = ""
    """Command that fixes it on this machine; empty if there is none."""


def run_checks() -> dict[str, Finding]:
    """Check the CPU, the GPU, all libraries for models and the slices; return findings by name."""
    slices = {f"slice_{name}": _check_slice(name) for name in ("train", "export", "eval", "serve")}
    return {name: check(name) for name in _CHECKS} | slices


def check(name: str) -> Finding:
    """Check one part of the machine, such as `onnxruntime` or `tensorrt_rtx`."""
    return _CHECKS[name]()


def summarize(findings: Mapping[str, Finding]) -> str:
    """Return what matters most about the findings of `run_checks`: what works, or what to fix."""
    needed = findings["onnxruntime"]
    if needed.state != "ok":
        return f"Models cannot run here, because ONNX Runtime is {needed.state}. Fix it: {needed.fix}"
    where = f"on this {'GPU' if findings['onnxruntime_gpu'].state == 'ok' else 'CPU'}"
    broken = next((finding for finding in findings.values() if finding.state == "broken"), None)
    if broken is not None:
        return f"Models run {where}, but {broken.part} is broken. Fix it: {broken.fix}"
    for name in ("torch", "timm"):
        if findings[name].state != "ok":
            return f"Models run {where}. Training and export need {name}: {findings[name].fix}"
    gpu, builders = find_gpu(), [findings[name] for name in ("tensorrt", "tensorrt_rtx")]
    rtx_is_useless = gpu is not None and gpu.sm not in (75, *RTX_DEFAULT_SMS)
    if builders[0].state != "ok" and (builders[1].state != "ok" or rtx_is_useless):
        fix = next((finding.fix for finding in builders if finding.fix), "")
        return f"Training and prediction work {where}; engines need {fix or 'another machine'}"
    return f"Training and prediction work {where}; engines build" + ("." if gpu else ", but run on GPUs only.")


def _check_slice(name: str) -> Finding:
    part = f"advprop[{name}] ({SLICES[name]})"
    missing = missing_requirements(name)
    if not missing:
        return Finding(part=part, state="ok", found="installed")
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return Finding(part=part, state="missing", found=", ".join(missing[:3]) + more, fix=slice_command(name))


def _check_machine() -> Finding:
    return Finding(
        part="machine",
        state="ok",
        found=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    )


def _check_gpu() -> Finding:
    gpu = find_gpu()
    if gpu is None:
        return Finding(part="GPU", state="missing", found="no NVIDIA driver, or no visible GPU")
    return Finding(part="GPU", state="ok", found=f"{gpu.name}, SM {gpu.sm}")


def _check_onnxruntime() -> Finding:
    part = "ONNX Runtime"
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]
    if len(installed) == 2:
        versions = " and ".join(f"{name} {_version(name)}" for name in installed)
        return Finding(
            part=part,
            state="broken",
            found=f"{versions} overwrite each other's files",
            fix=f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install {_onnxruntime_package()}",
        )
    try:
        import onnxruntime

        providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    except (ImportError, OSError, AttributeError) as error:
        package = installed[0] if installed else _onnxruntime_package()
        return Finding(
            part=part,
            state="broken" if installed else "missing",
            found=first_line(error),
            fix=f"pip install --force-reinstall {package}" if installed else f"pip install {package}",
        )
    return Finding(part=part, state="ok", found=f"{onnxruntime.__version__}, providers {', '.join(providers)}")


def _check_onnxruntime_gpu() -> Finding:
    part = "ONNX Runtime on the GPU"
    if find_gpu() is None:
        return Finding(part=part, state="missing", found="there is no GPU; models run on the CPU")
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        return Finding(part=part, state="missing", found=first_line(error), fix=f"pip install {_onnxruntime_package()}")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        fix = "pip uninstall -y onnxruntime && pip install onnxruntime-gpu" if _has_gpu_wheels() else ""
        return Finding(part=part, state="broken", found="this ONNX Runtime was built without CUDA", fix=fix)
    return Finding(part=part, state="ok", found="the CUDA provider is available; it starts when a model is loaded")


def _check_builder(name: str, part: str, packages: str, *, works_here: bool) -> Finding:
    try:
        flavor = choose_flavor(name, ())
    except BackendUnavailable as error:
        fix = f"pip install {packages}" if works_here else ""
        return Finding(part=part, state="missing", found=error.reason, fix=fix)
    return Finding(part=part, state="ok", found=flavor.version)


def _check_package(part: str, package: str, load: Callable[[], None]) -> Finding:
    version = _version(package)
    fix = f"pip install {package}"
    if version is None:
        return Finding(part=part, state="missing", found="not installed", fix=fix)
    try:
        load()
    except (ImportError, OSError, RuntimeError) as error:
        return Finding(part=part, state="broken", found=f"{version} cannot be imported: {first_line(error)}", fix=fix)
    return Finding(part=part, state="ok", found=version)


def _check_torch() -> Finding:
    finding = _check_package("torch (trains, exports)", "torch", _import_torch)
    if finding.state != "ok":
        return finding
    import torch

    has_cuda = torch.cuda.is_available()
    if find_gpu() is not None and not has_cuda:
        return Finding(
            part=finding.part,
            state="broken",
            found=f"{finding.found}, built for CUDA {torch.version.cuda or '(none)'}, cannot use the GPU",
            fix="pip install --force-reinstall torch"  # the default of PyPI has no CUDA on Windows
            + (" --index-url https://download.pytorch.org/whl/cu126" if sys.platform == "win32" else ""),
        )
    return Finding(part=finding.part, state="ok", found=f"{finding.found}, {'CUDA' if has_cuda else 'CPU only'}")


def _check_cpu_int8() -> Finding:
    part = "CPU for INT8"
    exact = has_exact_int8()
    if exact is None:
        return Finding(part=part, state="missing", found="unknown on this system")
    if exact:
        return Finding(part=part, state="ok", found="ONNX Runtime's INT8 kernels are exact (VNNI or similar)")
    return Finding(
        part=part,
        state="missing",
        found="no VNNI: ONNX Runtime's INT8 kernels saturate, so sessions run INT8 files in floating point",
    )


def _check_pycuda() -> Finding:
    part = "pycuda (GPUArray inputs)"
    if find_gpu() is None and _version("pycuda") is None:
        return Finding(part=part, state="missing", found="not installed, and of no use without a GPU")
    return _check_package(part, "pycuda", _import_pycuda)


def _has_gpu_wheels() -> bool:
    """Return whether ONNX Runtime with CUDA and TensorRT-RTX have wheels for this platform."""
    return platform.machine() in ("x86_64", "AMD64") and sys.platform in ("linux", "win32")


def _onnxruntime_package() -> str:
    return "onnxruntime-gpu" if _has_gpu_wheels() else "onnxruntime"


def _import_torch() -> None:
    import torch  # noqa: F401


def _import_timm() -> None:
    import timm  # noqa: F401


def _import_pycuda() -> None:
    import pycuda  # noqa: F401


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


_CHECKS: dict[str, Callable[[], Finding]] = {
    "machine": _check_machine,
    "gpu": _check_gpu,
    "onnxruntime": _check_onnxruntime,
    "onnxruntime_gpu": _check_onnxruntime_gpu,
    "tensorrt": lambda: _check_builder(
        "tensorrt", "TensorRT (builds engines)", "tensorrt cuda-bindings", works_here=find_gpu() is not None
    ),
    "tensorrt_rtx": lambda: _check_builder(
        "tensorrt_rtx", "TensorRT-RTX (builds engines)", "tensorrt-rtx", works_here=_has_gpu_wheels()
    ),
    "torch": _check_torch,
    "timm": lambda: _check_package("timm (trains, exports)", "timm", _import_timm),
    "pycuda": _check_pycuda,
    "vnni": _check_cpu_int8,
}
"""Name → check, in the order of the report."""
