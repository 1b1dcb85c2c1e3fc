"""What works on this machine, what does not, why, and the command that mends it."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from runtime.engine.flavors import choose_flavor
from runtime.errors import BackendUnavailable, first_line
from runtime.system.cpu import has_exact_int8
from runtime.system.gpu import find_gpu

__all__ = ["Finding", "examine", "look"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One part of the machine."""

    part: str
    """What was looked at."""
    state: str
    """`ok`, `missing` (nothing wrong, but this part cannot be used) or `broken`."""
    found: str
    """In words."""
    mend: str = ""
    """The command that mends it, where one does."""


def examine() -> list[Finding]:
    """Looks at the GPU and tries every library that runs or builds models."""
    return [look(name) for name in _LOOKS]


def look(name: str) -> Finding:
    """Looks at one part: a key of the table at the end, such as `onnxruntime` or `tensorrt_rtx`."""
    return _LOOKS[name]()


def _machine() -> Finding:
    return Finding(
        part="machine",
        state="ok",
        found=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    )


def _gpu() -> Finding:
    gpu = find_gpu()
    if gpu is None:
        return Finding(part="GPU", state="missing", found="no NVIDIA driver, or no GPU that it shows")
    return Finding(part="GPU", state="ok", found=f"{gpu.name}, SM {gpu.sm}")


def _onnxruntime() -> Finding:
    part = "ONNX Runtime"
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]
    versions = " and ".join(f"{name} {_version(name)}" for name in both)
    if len(both) == 2:
        return Finding(
            part=part,
            state="broken",
            found=f"{versions} overwrite each other's files",
            mend="pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu",
        )
    try:
        runtime = importlib.import_module("onnxruntime")
        providers = [name.removesuffix("ExecutionProvider") for name in runtime.get_available_providers()]
    except (ImportError, OSError, AttributeError) as error:
        package = both[0] if both else "onnxruntime-gpu"
        return Finding(
            part=part,
            state="broken" if both else "missing",
            found=first_line(error),
            mend=f"pip install --force-reinstall {package}" if both else f"pip install {package}",
        )
    return Finding(part=part, state="ok", found=f"{runtime.__version__}, providers {', '.join(providers)}")


def _onnxruntime_on_the_gpu() -> Finding:
    part = "ONNX Runtime on the GPU"
    if find_gpu() is None:
        return Finding(part=part, state="missing", found="there is no GPU to run on; models run on the CPU")
    try:
        runtime = importlib.import_module("onnxruntime")
    except (ImportError, OSError) as error:
        return Finding(part=part, state="missing", found=first_line(error), mend="pip install onnxruntime-gpu")
    if "CUDAExecutionProvider" not in runtime.get_available_providers():
        mend = "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
        return Finding(part=part, state="broken", found="this ONNX Runtime was built without CUDA", mend=mend)
    return Finding(part=part, state="ok", found="the CUDA provider is there; it is tried when a model is loaded")


def _builder(name: str, mend: str) -> Finding:
    part = {"tensorrt": "TensorRT (builds engines)", "tensorrt_rtx": "TensorRT-RTX (builds engines)"}[name]
    try:
        flavor = choose_flavor(name, ())
    except BackendUnavailable as error:
        reason = first_line(error).removeprefix("no engine builder can be used here: ")
        return Finding(part=part, state="missing", found=reason, mend=mend)
    return Finding(part=part, state="ok", found=flavor.version)


def _package(part: str, module: str, package: str, extra: str = "") -> Finding:
    version = _version(package)
    mend = f"pip install {extra or package}"
    if version is None:
        return Finding(part=part, state="missing", found="not installed", mend=mend)
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return Finding(part=part, state="broken", found=f"{version} cannot be imported: {first_line(error)}", mend=mend)
    return Finding(part=part, state="ok", found=version)


def _torch() -> Finding:
    finding = _package("torch (trains, exports)", "torch", "torch")
    if finding.state != "ok":
        return finding
    torch = importlib.import_module("torch")
    if find_gpu() is not None and not torch.cuda.is_available():
        return Finding(
            part=finding.part,
            state="broken",
            found=f"{finding.found} does not see the GPU: it was built for CUDA {torch.version.cuda or '(none)'}",
            mend="pip install --force-reinstall torch",
        )
    return Finding(
        part=finding.part, state="ok", found=f"{finding.found}, {'CUDA' if torch.cuda.is_available() else 'on the CPU'}"
    )


def _vnni() -> Finding:
    part = "CPU for INT8"
    exact = has_exact_int8()
    if exact is None:
        return Finding(part=part, state="missing", found="cannot be told on this system")
    if exact:
        return Finding(part=part, state="ok", found="ONNX Runtime's INT8 kernels are exact here (VNNI or the like)")
    return Finding(
        part=part,
        state="missing",
        found="no VNNI: ONNX Runtime's INT8 kernels saturate here; sessions run INT8 files in floating point instead",
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


_LOOKS: dict[str, Callable[[], Finding]] = {
    "machine": _machine,
    "gpu": _gpu,
    "onnxruntime": _onnxruntime,
    "onnxruntime_gpu": _onnxruntime_on_the_gpu,
    "tensorrt": lambda: _builder("tensorrt", "pip install 'advprop[tensorrt]'"),
    "tensorrt_rtx": lambda: _builder("tensorrt_rtx", "pip install tensorrt-rtx"),
    "torch": _torch,
    "timm": lambda: _package("timm (trains, exports)", "timm", "timm"),
    "pycuda": lambda: _package("pycuda (GPUArray inputs)", "pycuda", "pycuda", "'advprop[pycuda]'"),
    "vnni": _vnni,
}
